"""Stops anywhere, starts on other numbers of ranks: all ranks together read what a run that never stops reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.data.assemble import Plan
from vitscale.data.order import Order, Refs, SampleOrder, SequentialOrder
from vitscale.data.subset import Subset, SubsetOrder

STOPS = 20


@dataclass(frozen=True)
class Setting:
    """Some of the samples of some shards, and how they are read."""

    chosen: tuple[tuple[bool, ...], ...]  # of each shard's samples
    lanes: int
    share: int  # samples of a lane in a batch
    window: int
    repeats: int
    seed: int

    @property
    def batch(self) -> int:
        return self.lanes * self.share

    @property
    def ids(self) -> set[int]:
        return {shard << 32 | place for shard, places in enumerate(self.chosen) for place in np.flatnonzero(places)}

    @property
    def subset(self) -> Subset:
        places = [np.flatnonzero(of_shard).astype(np.int32) for of_shard in self.chosen]
        return Subset(np.concatenate([[0], np.cumsum([len(each) for each in places])]), np.concatenate(places))

    def order(self) -> SampleOrder:
        """A new one, as every start makes it."""
        subset = self.subset
        return SubsetOrder(Order(subset.counts, self.seed, self.batch, self.lanes, self.window, self.repeats), subset)


@st.composite
def settings_of_runs(draw: st.DrawFn) -> Setting:
    """Also with shards of which nothing is chosen, and with less than two batches an epoch."""
    lanes, repeats = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    share = draw(st.integers(1, 6)) if repeats == 1 else 2 * repeats + draw(st.integers(0, 4))
    shards = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=8))
    enough = [True] * (lanes * share + lanes)
    place = draw(st.integers(0, len(shards)))
    chosen = tuple(map(tuple, [*shards[:place], enough, *shards[place:]]))
    return Setting(chosen, lanes, share, draw(st.integers(1, 200)), repeats, draw(st.integers(0, 2**31)))


def joined(parts: list[Refs]) -> Refs:
    return Refs(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("epochs", "ids", "repeats")))


def read_by(
    setting: Setting, first_batch: int, batches: int, ranks: int, micro_batch: int, make: Callable[[], SampleOrder]
) -> list[Refs]:
    """What a start at `first_batch` reads, all ranks together: a row a global batch, in the order of its slots."""
    parts: list[list[tuple[int, Refs]]] = [[] for _ in range(batches)]
    for rank in range(ranks):
        order = make()
        plan = Plan(
            index=None, order=order, crop=None, decoder="pillow", channels=3, background=0, max_pixels=1,
            image_size=None, image_bytes=None, extension="cls", labels=None,
            seed=setting.seed, global_batch=setting.batch,
            micro_batch=micro_batch, rank=rank, ranks=ranks, first_batch=first_batch, threads=1, prefetch=1,
            table_samples=1, ahead=0,
        )  # fmt: skip
        for number in range(batches * (setting.batch // ranks // micro_batch)):
            batch, first, last = plan.slots(number)
            parts[batch - first_batch].append((first, order.refs(batch, first, last)))
    return [joined([refs for _, refs in sorted(of_batch, key=lambda part: part[0])]) for of_batch in parts]


def rows(read: list[Refs], seed: int) -> list[list[tuple[int, ...]]]:
    return [list(zip(*(each.tolist() for each in (refs.epochs, refs.ids, refs.repeats, refs.keys(seed))), strict=True))
            for refs in read]  # fmt: skip


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


@settings(max_examples=15)
@given(settings_of_runs(), st.data())
def test_chains_of_stops_give_the_unbroken_trace(setting: Setting, data: st.DataObject) -> None:
    """Twenty starts, each on another number of ranks and with another micro-batch, over the borders of epochs."""
    steps = data.draw(st.lists(st.integers(0, 4), min_size=STOPS, max_size=STOPS))
    unbroken, order = [], setting.order()
    for batch in range(sum(steps)):
        unbroken.append(order.refs(batch, 0, setting.batch))
    chain: list[Refs] = []
    for count in steps:
        ranks = data.draw(st.sampled_from(divisors(setting.batch)))
        micro_batch = data.draw(st.sampled_from(divisors(setting.batch // ranks)))
        chain += read_by(setting, len(chain), count, ranks, micro_batch, setting.order)
    assert rows(chain, setting.seed) == rows(unbroken, setting.seed)


@settings(max_examples=40)
@given(settings_of_runs(), st.integers(0, 3))
def test_each_chosen_sample_as_often_an_epoch_as_is_said(setting: Setting, epoch: int) -> None:
    """Each view once but for a small tail, nothing else, by however many ranks."""
    order = setting.order()
    per_epoch = order.batches_per_epoch
    read = read_by(setting, epoch * per_epoch, per_epoch, setting.batch, 1, setting.order)
    views = Counter(
        (id, repeat) for refs in read for id, repeat in zip(refs.ids.tolist(), refs.repeats.tolist(), strict=True)
    )
    assert set(views.values()) == {1}
    assert {id for id, _ in views} <= setting.ids
    assert {repeat for _, repeat in views} <= set(range(setting.repeats))
    assert all((refs.epochs == epoch).all() for refs in read)
    run = 1 if setting.repeats == 1 else setting.share // (2 * setting.repeats) * 2
    tail = setting.batch + setting.repeats * setting.lanes * run
    assert len(setting.ids) * setting.repeats - len(views) < tail
    following = order.refs((epoch + 1) * per_epoch, 0, setting.batch)
    assert (following.epochs == epoch + 1).all()
    samples = 3 * setting.share
    ahead = set(order.shards_ahead(epoch * per_epoch, 0, setting.batch, samples).tolist())
    for batch in range(epoch * per_epoch, epoch * per_epoch + 4):
        assert set((order.refs(batch, 0, setting.batch).ids >> 32).tolist()) <= ahead


@settings(max_examples=15)
@given(settings_of_runs(), st.data())
def test_evaluation_scores_each_chosen_sample_once_on_any_ranks(setting: Setting, data: st.DataObject) -> None:
    def order() -> SampleOrder:
        return SubsetOrder(SequentialOrder(setting.subset.counts, setting.batch), setting.subset)

    ranks = data.draw(st.sampled_from(divisors(setting.batch)))
    read = joined(read_by(setting, 0, order().batches_per_epoch, ranks, setting.batch // ranks, order))
    assert sorted(read.ids[read.repeats == 0].tolist()) == sorted(setting.ids)
    assert len(read) - len(setting.ids) < setting.batch
