"""A split by the hash of keys, and an order over one side of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.makers import write_shards
from vitscale.config.schema import Data
from vitscale.data.order import Order, SequentialOrder
from vitscale.data.subset import SubsetOrder, chosen_by_hash, split
from vitscale.errors import DataError
from vitscale.evaluation.validation import HeldOut


def keys_of(index, subset) -> set[str]:
    return {index.table(shard, "cls").key(i) for shard in range(len(index.paths)) for i in subset.of_shard(shard)}


def test_each_sample_on_one_side_whatever_the_shards(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = write_shards(tmp_path / "a", [40, 30, 30]), write_shards(tmp_path / "b", [100])
    sides = split(one, Data(validation_fraction=0.3), 0)
    training, validation = (keys_of(one, side) for side in sides)
    assert training | validation == {f"{number:06d}" for number in range(100)}
    assert not training & validation
    assert 15 < len(validation) < 45
    assert keys_of(other, split(other, Data(validation_fraction=0.3), 5)[1]) == validation, "by the key alone"
    assert keys_of(one, split(one, Data(validation_fraction=0.5), 0)[1]) > validation, (
        "a larger share holds the smaller one"
    )
    with pytest.raises(DataError, match=r"data.validation_fraction=1e-09, .*leave 100 samples to train on and 0"):
        split(one, Data(validation_fraction=1e-9), 0)


def test_a_share_of_the_training_side_by_the_seed(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [100, 100])
    whole, held_out = split(index, Data(validation_fraction=0.3), 0)
    parts = [split(index, Data(validation_fraction=0.3, fraction=0.2), seed) for seed in range(3)]
    assert all(keys_of(index, side[1]) == keys_of(index, held_out) for side in parts)
    keys = [keys_of(index, side[0]) for side in parts]
    assert all(part < keys_of(index, whole) for part in keys)
    assert all(10 < len(part) < 50 for part in keys)
    assert keys[0] != keys[1] != keys[2]
    assert split(index, Data(fraction=0.2), 0)[1].total == 0


def test_a_share_of_one_side_is_within_it(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [100, 60, 40])
    _, validation = split(index, Data(validation_fraction=0.5), 0)
    of_side, of_all = chosen_by_hash(index, "cls", 0.4, validation), chosen_by_hash(index, "cls", 0.4)
    assert keys_of(index, of_side) == keys_of(index, of_all) & keys_of(index, validation)
    assert 20 < of_side.total < 60
    assert 50 < of_all.total < 110
    with pytest.raises(DataError, match=r"evaluation.images=1: a hash chooses none of 200 images"):
        HeldOut(index).at_most(1, "cls")


def test_an_order_over_one_side(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [40, 1, 30, 29])
    training, validation = split(index, Data(validation_fraction=0.3), 0)
    assert training.counts.sum() == training.total
    order = SubsetOrder(Order(training.counts, 3, 8, 2, 16), training)
    seen = np.concatenate([order.refs(batch, 0, 8).ids for batch in range(order.batches_per_epoch)]).tolist()
    ids = {(shard << 32) | int(i) for shard in range(4) for i in training.of_shard(shard)}
    assert len(set(seen)) == len(seen)
    assert set(seen) <= ids
    assert len(ids) - len(seen) < 8 + 2
    assert set(order.candidates(1, 3).ids.tolist()) <= ids
    for batch in range(order.batches_per_epoch):
        ahead = set(order.shards_ahead(batch, 0, 8, 20).tolist())
        assert set((order.refs(batch, 0, 8).ids >> 32).tolist()) <= ahead
    whole = SubsetOrder(SequentialOrder(validation.counts, 8), validation)
    refs = [whole.refs(batch, 0, 8) for batch in range(whole.batches_per_epoch)]
    once = [
        sample for each in refs for sample, repeat in zip(each.ids.tolist(), each.repeats, strict=True) if not repeat
    ]
    assert once == sorted((shard << 32) | int(i) for shard in range(4) for i in validation.of_shard(shard))
