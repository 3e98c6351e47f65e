"""Through the real reader: whatever order gives the references, a sample's view is what its reference says."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.makers import photo, write_shards, write_tar
from vitscale import rng
from vitscale.config.schema import Data
from vitscale.data.batch import Batch
from vitscale.data.crop import RandomCrop
from vitscale.data.index import ShardIndex, build_index
from vitscale.data.loader import Loader
from vitscale.data.mixture import Mixture
from vitscale.data.order import Order, Refs, SampleOrder
from vitscale.world import World

BATCH, SEED = 8, 7
View = tuple[int, int, int]  # epoch, id, repeat


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("shards"), [10, 14, 30])


def take(index: ShardIndex, order: SampleOrder, count: int) -> list[Batch]:
    settings = Data(threads=2, prefetch=count, decode="simplejpeg", max_bad_fraction=1.0)
    with Loader(
        index=index, order=order, crop=RandomCrop((0.2, 1.0), (0.75, 4 / 3)), data=settings, num_channels=3, seed=SEED,
        world=World(), global_batch=BATCH, micro_batch=BATCH, start=0,
    ) as loader:  # fmt: skip
        return [replace(batch, pixels=batch.pixels.copy()) for batch in islice(loader, count)]


def views(batches: list[Batch], order: SampleOrder) -> dict[View, Any]:
    """What was seen of each view; the batches' ids, epochs and keys are checked on the way."""
    seen = {}
    for number, batch in enumerate(batches):
        refs = order.refs(number, 0, BATCH)
        assert batch.sample_ids.tolist() == refs.ids.tolist()
        assert batch.epochs.tolist() == refs.epochs.tolist()
        assert batch.sample_keys.tolist() == keys_of(refs)
        for i, view in enumerate(zip(*(part.tolist() for part in (refs.epochs, refs.ids, refs.repeats)), strict=True)):
            seen[view] = (int(batch.sample_keys[i]), batch.boxes[i].tolist(), batch.image(i).tobytes())
    return seen


def keys_of(refs: Refs) -> list[int]:
    """One by one, as a single sample's key is hashed."""
    parts = zip(refs.epochs.tolist(), refs.ids, refs.repeats.tolist(), strict=True)
    return [int(rng.sample_key(SEED, epoch, np.array([sample_id]), repeat)[0]) for epoch, sample_id, repeat in parts]


def test_sources_with_epochs_of_their_own_and_repeated_views(index: ShardIndex) -> None:
    parts = [index.samples[:1], index.samples[1:]]  # 10 and 44 images, the former as often as the latter
    mixture = Mixture(parts, [4.4, 1.0], SEED, BATCH, 1, 1000)
    batches = take(index, mixture, 6)
    assert {int(epoch) for batch in batches for epoch in batch.epochs} == {0, 1, 2}
    assert [batch.epoch for batch in batches] == [0] * 6
    mixed = views(batches, mixture)
    assert len(mixed) == len({key for key, *_ in mixed.values()}) == 6 * BATCH

    repeated = Order(index.samples, SEED, BATCH, 1, 1000, repeats=3)
    seen = views(take(index, repeated, 15), repeated)
    assert len(seen) == len({key for key, *_ in seen.values()}) == 15 * BATCH, "a key of its own for every view"
    by_sample = defaultdict(list)
    for (_, sample_id, _), (_, box, pixels) in seen.items():
        by_sample[sample_id].append((str(box), pixels))
    assert {len(of_it) for of_it in by_sample.values()} == {3}
    assert sum(len(set(of_it)) == 3 for of_it in by_sample.values()) > 30, "of 40; small images have few crops"

    both = mixed.keys() & seen.keys()
    assert len(both) > 15
    assert all(mixed[view] == seen[view] for view in both), "the same view, whatever the order and the slot"


def test_a_replacement_is_a_view_of_its_own(tmp_path: Path) -> None:
    """All views of a bad sample become views of one other sample, with the keys that these have anywhere."""
    images = {i: b"no image" if i == 5 else photo(i, 40, 50) for i in range(24)}
    index = build_index([str(write_tar(tmp_path / "a.tar", [(f"{i:02d}.jpg", data) for i, data in images.items()]))])
    order = Order(index.samples, SEED, BATCH, 1, 1000, repeats=4)
    batches = take(index, order, 12)
    bad = [(number, item.slot) for number, batch in enumerate(batches) for item in batch.replaced]
    assert len(bad) == 4, "as often as it would have come"
    seen: dict[int, set[str]] = defaultdict(set)
    for number, batch in enumerate(batches):
        for slot in range(BATCH):
            is_bad = (number, slot) in bad
            ref = order.candidates(number, slot)[:1] if is_bad else order.refs(number, slot, slot + 1)
            assert (batch.sample_ids[slot], batch.epochs[slot]) == (ref.ids[0], ref.epochs[0])
            assert [int(batch.sample_keys[slot])] == keys_of(ref)
            seen[int(batch.sample_keys[slot])].add(batch.image(slot).tobytes().hex())
    stand_ins = {int(batches[number].sample_ids[slot]) for number, slot in bad}
    assert len(stand_ins) == 1
    assert len({int(batches[number].sample_keys[slot]) for number, slot in bad}) == 4
    assert {len(pixels) for pixels in seen.values()} == {1}, "one key, one picture"
