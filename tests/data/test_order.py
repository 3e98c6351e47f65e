from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.data.order import SUBSTITUTES, Order, SequentialOrder
from vitscale.errors import DataError


def all_ids(counts: list[int]) -> set[int]:
    return {shard << 32 | place for shard, count in enumerate(counts) for place in range(count)}


def whole(order: Order | SequentialOrder, batch: int, size: int) -> np.ndarray:
    return order.refs(batch, 0, size).ids


shapes = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),  # samples in each shard
    st.integers(1, 5),  # lanes
    st.integers(1, 6),  # samples of a lane in a batch
    st.integers(1, 200),  # window
    st.integers(0, 2**31),  # seed
)


@settings(max_examples=30)
@given(shapes)
def test_each_sample_once_an_epoch_but_a_small_tail(shape: tuple[list[int], int, int, int, int]) -> None:
    counts, lanes, share, window, seed = shape
    size = lanes * share
    if sum(counts) < size + lanes:
        with pytest.raises(DataError, match=r"train\.global_batch"):
            Order(np.array(counts), seed, size, lanes, window)
        return
    order = Order(np.array(counts), seed, size, lanes, window)
    for epoch in range(3):
        batches = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
        ids = np.concatenate([whole(order, batch, size) for batch in batches])
        refs = [order.refs(batch, 0, size) for batch in batches]
        assert all((batch.epochs == epoch).all() and (batch.repeats == 0).all() for batch in refs)
        assert len(set(ids.tolist())) == len(ids)
        assert set(ids.tolist()) <= all_ids(counts)
        assert sum(counts) - len(ids) < size + lanes


@settings(max_examples=40)
@given(shapes, st.integers(0, 50), st.data())
def test_any_run_of_slots_is_a_part_of_the_batch(
    shape: tuple[list[int], int, int, int, int], batch: int, data: st.DataObject
) -> None:
    counts, lanes, share, window, seed = shape
    size = lanes * share
    counts = counts + [size + lanes]
    order = Order(np.array(counts), seed, size, lanes, window)
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    assert order.refs(batch, first, last).ids.tolist() == whole(order, batch, size)[first:last].tolist()
    again = Order(np.array(counts), seed, size, lanes, window)  # no state: any position comes first
    assert again.refs(batch, first, last).ids.tolist() == order.refs(batch, first, last).ids.tolist()


@settings(max_examples=40)
@given(shapes, st.integers(2, 4), st.integers(0, 3))
def test_repeats_show_runs_of_samples_again(
    shape: tuple[list[int], int, int, int, int], repeats: int, extra: int
) -> None:
    """A lane's views are those of the order without repeats, in runs of K, each run R times."""
    counts, lanes, _, window, seed = shape
    share = 2 * repeats + extra
    size, run = lanes * share, share // (2 * repeats) * 2
    counts = counts + [size + lanes]
    order = Order(np.array(counts), seed, size, lanes, window, repeats)
    plain = Order(np.array(counts), seed, lanes, lanes, window)  # one sample of each lane a batch
    for lane in range(lanes):
        slots = (lane * share, (lane + 1) * share)
        refs = [order.refs(batch, *slots) for batch in range(order.batches_per_epoch)]
        ids = np.concatenate([each.ids for each in refs]).tolist()
        views = np.concatenate([each.repeats for each in refs]).tolist()
        once = [int(plain.refs(batch, lane, lane + 1).ids[0]) for batch in range(plain.batches_per_epoch)]
        expected = [
            (sample, view)
            for start in range(0, len(once) - run + 1, run)
            for view in range(repeats)
            for sample in once[start : start + run]
        ]
        assert list(zip(ids, views, strict=True)) == expected[: len(ids)]
        assert len(expected) - len(ids) < share
        assert all(a != b for a, b in itertools.pairwise(ids)), "neighbours are other images"
    candidates = order.candidates(0, size - 1)
    assert set(candidates.repeats.tolist()) == {int(order.refs(0, size - 1, size).repeats[0])}
    ahead = set(order.shards_ahead(0, 0, size, 3 * share).tolist())
    for batch in range(min(4, order.batches_per_epoch)):
        assert set((whole(order, batch, size) >> 32).tolist()) <= ahead


def test_a_block_is_permuted_within_itself() -> None:
    """One shard, one lane: a block of the epoch holds neighbours of the (rotated) shard, in another order."""
    order = Order(np.array([1000]), 3, 10, 1, 50)
    ids = np.concatenate([whole(order, batch, 10) for batch in range(order.batches_per_epoch)])
    for start in range(0, 1000, 50):
        block = np.sort(ids[start : start + 50])
        gaps = np.diff(block, append=block[0] + 1000)
        assert np.count_nonzero(gaps != 1) == 1, "neighbours on the ring of the rotated shard"
        assert ids[start : start + 50].tolist() != block.tolist()


def test_epochs_and_seeds_differ_and_drop_other_tails() -> None:
    counts = np.array([100, 90, 80])
    order = Order(counts, 1, 64, 4, 100)
    epochs = [[whole(order, e * order.batches_per_epoch + t, 64).tolist() for t in range(order.batches_per_epoch)]
              for e in range(4)]  # fmt: skip
    assert len({str(epoch) for epoch in epochs}) == 4
    dropped = [frozenset(all_ids([100, 90, 80])) - {i for batch in epoch for i in batch} for epoch in epochs]
    assert len(set(dropped)) == 4
    assert whole(Order(counts, 2, 64, 4, 100), 0, 64).tolist() != epochs[0][0]


def test_a_rank_that_owns_lanes_reads_its_shards_nearly_front_to_back() -> None:
    order = Order(np.full(64, 100), 5, 32, 8, 8 * 50)
    lane = np.concatenate([order.refs(batch, 0, 4).ids for batch in range(order.batches_per_epoch)])
    places = {int(shard): np.flatnonzero(lane >> 32 == shard) for shard in np.unique(lane >> 32)}
    assert len(places) <= 10  # of 8 shards' worth
    for shard, at in places.items():
        assert np.ptp(at) < 100 + 2 * 50, "a shard is read within its own length and a block at each end"
        blocks = [np.sort(lane[at[at // 50 == block]]) for block in np.unique(at // 50)]
        assert np.concatenate(blocks).tolist() == sorted(lane[at].tolist()), (shard, "blocks follow the shard's order")


@settings(max_examples=40)
@given(shapes, st.integers(0, 30))
def test_candidates_are_other_samples_and_the_next_in_order_comes_first(
    shape: tuple[list[int], int, int, int, int], batch: int
) -> None:
    counts, lanes, share, window, seed = shape
    size = lanes * share
    counts = counts + [size + lanes]
    order = Order(np.array(counts), seed, size, lanes, window)
    for slot in range(size):
        refs, candidates = order.refs(batch, slot, slot + 1), order.candidates(batch, slot)
        own, others = int(refs.ids[0]), candidates.ids.tolist()
        assert (candidates.epochs == refs.epochs).all()
        assert (candidates.repeats == 0).all()
        assert own not in others
        assert len(others) == min(SUBSTITUTES, sum(counts) // lanes - 1) == len(set(others))
        assert set(others) <= all_ids(counts)


def test_candidates_stay_in_the_block() -> None:
    order = Order(np.array([1000]), 3, 10, 1, 50)
    ids = np.concatenate([whole(order, batch, 10) for batch in range(order.batches_per_epoch)]).tolist()
    block = ids[100:150]
    for place in (0, 1, 9):
        others = order.candidates(10, place).ids.tolist()
        assert others[:49] == (block + block)[place + 1 : place + 50]


def test_a_huge_index_costs_what_a_batch_costs() -> None:
    """1e9 samples in 1e5 shards: only the batch's own blocks are permuted."""
    order = Order(np.full(100_000, 10_000), 7, 4096, 1024, 2048)
    batch = 3 * order.batches_per_epoch + 12345
    refs = order.refs(batch, 0, 4096)
    assert refs.epochs.tolist() == [3] * 4096
    assert len(set(refs.ids.tolist())) == 4096
    assert (refs.ids & 0xFFFFFFFF).max() < 10_000
    ahead = order.shards_ahead(batch, 64, 96, 20_000)  # 8 lanes: each reads 2 or 3 more shards
    assert 8 * 3 <= len(ahead) <= 8 * 4


lanes_ahead = st.tuples(st.integers(0, 60), st.integers(1, 90))  # a batch, samples


@settings(max_examples=60)
@given(shapes, lanes_ahead, st.data())
def test_shards_ahead_holds_what_comes(
    shape: tuple[list[int], int, int, int, int], place: tuple[int, int], data: st.DataObject
) -> None:
    """Also across the borders of epochs, which hold few batches here."""
    counts, lanes, share, window, seed = shape
    (batch, samples), size = place, lanes * share
    counts = counts + [size + lanes]
    order = Order(np.array(counts), seed, size, lanes, window)
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    ahead = order.shards_ahead(batch, first, last, samples).tolist()
    assert len(set(ahead)) == len(ahead)
    assert set(ahead) <= set(range(len(counts)))
    from_lane, to_lane = first // share * share, ((last - 1) // share + 1) * share
    for later in range(1 + samples // share):
        coming = order.refs(batch + later, from_lane, to_lane).ids >> 32
        assert set(coming.tolist()) <= set(ahead)
    again = Order(np.array(counts), seed, size, lanes, window)
    assert again.shards_ahead(batch, first, last, samples).tolist() == ahead


def test_shards_ahead_names_the_soonest_first_and_little_else() -> None:
    """A lane of 8 shards in blocks of half a shard, at each batch: the first named is read now, the last ones last."""
    order = Order(np.full(64, 100), 5, 32, 8, 8 * 50)
    lane = np.concatenate([order.refs(batch, 0, 4).ids for batch in range(order.batches_per_epoch)]) >> 32
    for batch in range(order.batches_per_epoch - 100):
        ahead = order.shards_ahead(batch, 0, 4, 300).tolist()
        here, end = batch * 4 // 50 * 50, -(-(batch * 4 + 304) // 50) * 50  # its blocks
        first_read = {int(shard): int(np.argmax(lane[here:end] == shard)) // 50 for shard in set(lane[here:end])}
        assert set(ahead) == set(first_read), "the shards of the blocks, no others"
        assert [first_read[shard] for shard in ahead] == sorted(first_read.values())
    both = order.shards_ahead(0, 0, 8, 300).tolist()
    apart = [order.shards_ahead(0, first, first + 4, 300).tolist() for first in (0, 4)]
    assert set(both) == set(apart[0] + apart[1])
    assert {apart[0][0], apart[1][0]} <= set(both[:4]), "what every lane needs now comes before what one needs later"


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12))
def test_sequential_order_is_the_index_and_then_repeats(counts: list[int], size: int) -> None:
    order = SequentialOrder(np.array(counts), size)
    ids = np.concatenate([whole(order, batch, size) for batch in range(order.batches_per_epoch)]).tolist()
    assert ids[: sum(counts)] == sorted(all_ids(counts))
    assert ids[sum(counts) :] == (ids[: sum(counts)] * size)[: len(ids) - sum(counts)]
    assert len(ids) - sum(counts) < size
    repeats = np.concatenate([order.refs(batch, 0, size).repeats for batch in range(order.batches_per_epoch)])
    assert sorted(id for id, repeat in zip(ids, repeats, strict=True) if repeat == 0) == sorted(all_ids(counts))
    assert order.candidates(0, 0).ids.tolist() == ids[1 : sum(counts)][:SUBSTITUTES]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 20), st.integers(0, 60))
def test_sequential_shards_ahead_are_those_that_come(counts: list[int], size: int, batch: int, samples: int) -> None:
    order = SequentialOrder(np.array(counts), size)
    batch %= order.batches_per_epoch
    shards = np.concatenate([whole(order, b, size) for b in range(order.batches_per_epoch)]) >> 32
    for first, last in ((0, size), (size // 2, size)):
        coming = shards[batch * size + first : batch * size + last + samples].tolist()
        assert order.shards_ahead(batch, first, last, samples).tolist() == list(dict.fromkeys(coming))
