"""Several sources in one order: shares, epochs of their own, any position, any slots."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.makers import write_shards
from vitscale.config.load import load_config
from vitscale.config.schema import Source
from vitscale.data.index import ShardIndex, open_index
from vitscale.data.mixture import Mixture, _require_shares, training_order, whole_counts
from vitscale.data.order import SUBSTITUTES, Order, Refs
from vitscale.errors import DataError

sources = st.lists(
    st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(0.2, 5)), min_size=2, max_size=4
)
shapes = st.tuples(sources, st.integers(1, 6), st.integers(1, 6), st.integers(1, 200), st.integers(0, 2**31))


def made(shape: tuple[list[tuple[list[int], float]], int, int, int, int], repeats: int = 1) -> Mixture:
    parts, lanes, share, window, seed = shape
    counts = [np.array([*counts, 1]) for counts, _ in parts]
    return Mixture(counts, [times for _, times in parts], seed, lanes * share, lanes, window, repeats)


def source_of(order: Mixture, refs: Refs) -> np.ndarray:
    starts = np.array(order._first_shards)
    return np.searchsorted(starts, refs.ids >> 32, side="right") - 1


@settings(max_examples=15)
@given(shapes)
def test_each_sample_of_a_source_once_in_each_of_its_epochs(
    shape: tuple[list[tuple[list[int], float]], int, int, int, int],
) -> None:
    order, size = made(shape), shape[1] * shape[2]
    number = 3 * order.batches_per_epoch + 40
    seen = Counter[tuple[int, int]]()
    for refs in (order.refs(batch, 0, size) for batch in range(number)):
        seen.update(zip(refs.epochs.tolist(), refs.ids.tolist(), strict=True))
    assert set(seen.values()) == {1}
    first = 0
    for passes, (counts, _) in zip(order._passes, shape[0], strict=True):
        own = {shard << 32 | place for shard, n in enumerate([*counts, 1], first) for place in range(n)}
        first += len(counts) + 1
        for epoch in range(order.epoch(number)):
            whole = {sample for of, sample in seen if of == epoch and sample in own}
            assert len(whole) == passes.lanes * passes.lane_length > len(own) - passes.lanes
    assert {sample >> 32 for _, sample in seen} <= set(range(first))


@settings(max_examples=40)
@given(shapes, st.integers(0, 400), st.integers(1, 3), st.data())
def test_any_slots_of_any_batch_without_what_came_before(
    shape: tuple[list[tuple[list[int], float]], int, int, int, int], batch: int, repeats: int, data: st.DataObject
) -> None:
    shape = (shape[0], shape[1], max(shape[2], 2 * repeats), *shape[3:])
    order, again = made(shape, repeats), made(shape, repeats)
    size = shape[1] * shape[2]
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    whole, part = order.refs(batch, 0, size), again.refs(batch, first, last)
    for name in ("ids", "epochs", "repeats"):
        assert getattr(part, name).tolist() == getattr(whole[first:last], name).tolist()
    candidates, own = order.candidates(batch, first), whole[first : first + 1]
    assert source_of(order, candidates).tolist() == source_of(order, own).tolist() * len(candidates)
    assert (candidates.epochs == own.epochs[0]).all()
    assert (candidates.repeats == own.repeats[0]).all()
    assert own.ids[0] not in candidates.ids
    assert 1 <= len(candidates) <= SUBSTITUTES
    samples = data.draw(st.integers(0, 60))
    ahead = order.shards_ahead(batch, first, last, samples).tolist()
    assert len(set(ahead)) == len(ahead)
    lanes = (first // shape[2] * shape[2], ((last - 1) // shape[2] + 1) * shape[2])
    for later in range(1 + samples // shape[2]):
        assert set((order.refs(batch + later, *lanes).ids >> 32).tolist()) <= set(ahead)


@settings(max_examples=60)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5))
def test_whole_counts_are_near_the_shares(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    counts = whole_counts(shares.tolist())
    assert min(counts) >= 1
    assert np.abs(np.array(counts) / sum(counts) - shares).max() <= len(weights) / 1024


def test_shares_that_a_short_period_says_are_exact() -> None:
    assert whole_counts([0.5, 0.5]) == [32, 32]
    assert whole_counts([2 / 3, 1 / 3]) == [44, 22]
    assert whole_counts([0.7, 0.2, 0.1]) == [49, 14, 7]
    counts = whole_counts([1 - 5e-5, 5e-5])  # ten thousand images five times, beside a thousand million
    assert counts[1] / sum(counts) == pytest.approx(5e-5, rel=0.02)
    assert min(whole_counts([1 - 1e-9, 1e-9])) == 1, "what is there comes"


def test_every_batch_has_the_shares() -> None:
    parts = [np.full(30, 1000), np.full(10, 1000), np.array([500])]
    order = Mixture(parts, [1.0, 2.0, 20.0], 3, 1024, 256, 4096)
    for batch in (0, 1, 17, 1000):
        refs = order.refs(batch, 0, 1024)
        counts = np.bincount(source_of(order, refs), minlength=3)
        assert np.abs(counts / 1024 - np.array([0.5, 1 / 3, 1 / 6])).max() < 0.02
        sources = source_of(order, refs).reshape(-1, 2)
        pairs = Counter(map(tuple, np.sort(sources, axis=1).tolist()))
        assert len(pairs) == 6, "neighbours are of all pairs of sources"
    assert order.batches_per_epoch == 60000 // 1024
    assert order.epoch(order.batches_per_epoch) == 0, "the largest source has a tail left"
    assert order.refs(order.batches_per_epoch, 0, 1024).epochs.max() >= 18, "the small one is in an epoch of its own"
    assert [order.epoch(batch) for batch in (0, 61, 122)] == [0, 1, 2]


def test_a_source_of_fewer_samples_than_lanes() -> None:
    order = Mixture([np.full(40, 100), np.array([5])], [1.0, 100.0], 1, 64, 32, 512)
    counts = Counter[int]()
    for batch in range(200):
        refs = order.refs(batch, 0, 64)
        counts.update((refs.ids[source_of(order, refs) == 1] & 0xFFFFFFFF).tolist())
    assert len(counts) == 5
    assert max(counts.values()) - min(counts.values()) <= 0.3 * np.mean(list(counts.values()))


def test_the_config_decides(tmp_path: Path) -> None:
    for name, counts in (("a", [30, 30]), ("b", [20])):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, counts)
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 5, global_batch: 8, micro_batch: 8}\n")

    def opened(*overrides: str) -> tuple[ShardIndex, Order | Mixture]:
        config = load_config(path, overrides)
        index = open_index(config.data.train, None, tmp_path)
        again = ShardIndex.from_bytes(index.to_bytes())
        assert again.sources == index.sources
        order = training_order(config, again.samples, again.sources)
        assert isinstance(order, (Order, Mixture))
        return index, order

    a, b = f"{tmp_path}/a/*.tar", f"{tmp_path}/b/*.tar"
    index, order = opened(f"data.train=['{a}', '{b}']")
    assert isinstance(order, Order), "one set of shards, where nothing else is said"
    assert index.sources == (2, 1)
    _, order = opened(f"data.train=['{a}', {{pattern: '{b}', repeat: 3}}]")
    assert isinstance(order, Mixture)
    assert order.batches_per_epoch == 120 // 8
    _, order = opened(f"data.train=[{{pattern: '{a}', weight: 1}}, {{pattern: '{b}', weight: 3}}]")
    assert order.batches_per_epoch == 80 // 8
    drawn = np.concatenate([order.refs(batch, 0, 8).ids >> 32 for batch in range(40)])
    assert np.mean(drawn == 2) == pytest.approx(0.75, abs=0.02)
    _, order = opened(f"data.train=['{a}', {{pattern: '{b}', repeat: 3}}]", "data.epoch_samples=16")
    assert (order.batches_per_epoch, order.epoch(5)) == (2, 2)
    _, order = opened(f"data.train=['{a}']", "data.epoch_samples=16")
    assert (order.batches_per_epoch, order.epoch(5)) == (2, 2)
    for sources in (f"data.train=['{a}']", f"data.train=['{a}', {{pattern: '{b}', repeat: 3}}]"):
        _, short = opened(sources, "data.epoch_samples=3")  # whole batches: one
        assert (short.batches_per_epoch, short.epoch(5)) == (1, 5)
    plain = opened(f"data.train=['{a}']")[1]
    for batch in (0, 7, 30):
        assert order.refs(batch, 0, 8).ids.tolist() == plain.refs(batch, 0, 8).ids.tolist(), "nothing but its name"
    huge = [np.full(1000, 10**7), np.array([10])]
    with pytest.raises(DataError, match=r"pattern=b: its share of the samples would be 1e-09, and one of 2 .* 2.4e-07"):
        _require_shares([Source("a"), Source("b")], huge, [1.0, 1.0])
    (tmp_path / "one").mkdir()
    write_shards(tmp_path / "one", [1])
    with pytest.raises(DataError, match=r"one/\*\.tar: holds 1 samples, and a source needs two"):
        opened(f"data.train=['{a}', {{pattern: '{tmp_path}/one/*.tar', repeat: 3}}]")


def test_any_position_costs_the_same() -> None:
    """A small source is in its millionth epoch, and only those that are due are shuffled."""
    order = Mixture([np.full(2000, 1000), np.array([30, 20])], [1.0, 100.0], 1, 1024, 256, 4096)
    batch = 1_000_000_000
    refs = order.refs(batch, 0, 1024)
    small = source_of(order, refs) == 1
    assert refs.epochs[small].min() > 1_000_000
    ahead = order.shards_ahead(batch, 0, 1024, 40)
    assert set((refs.ids >> 32).tolist()) <= set(ahead.tolist())
    assert max(len(passes._shuffles) for passes in order._passes) <= 3
