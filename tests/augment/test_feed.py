"""The device feed: the loader's batches as they are, ahead of who takes them, and memories given back in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.augment.test_pipeline import a_batch
from vitscale.augment.feed import DeviceFeed
from vitscale.augment.pipeline import Augment
from vitscale.config.augmentation import Augmentation
from vitscale.data.batch import Replacement
from vitscale.errors import DataError


class Lender:
    """Batches in numbered memories, as the loader's: one that is out is never written over."""

    def __init__(self, end: int = 100, memories: int = 3, seconds: float = 0.0, bad: int | None = None) -> None:
        self.number, self.end, self.memories, self.seconds, self.bad = 0, end, memories, seconds, bad
        self.has_next = True
        self.out: list[SimpleNamespace] = []
        self.space = [np.zeros(1 << 12, np.uint8) for _ in range(memories)]

    def ready(self) -> bool:
        return self.has_next and len(self.out) < self.memories

    def __next__(self) -> SimpleNamespace:
        assert len(self.out) < self.memories, "nothing is free to be filled"
        time.sleep(self.seconds)
        if self.number == self.bad:
            raise DataError("batch is bad")
        if self.number == self.end:
            raise StopIteration
        batch = batch_of(self.number)
        pixels = self.memory(batch)[1][: len(batch.pixels)]
        pixels[:] = batch.pixels
        batch.pixels = pixels
        self.out.append(batch)
        self.number += 1
        return batch

    def release(self, batch: SimpleNamespace) -> None:
        assert batch is self.out.pop(0), "the first one out is the first one back"
        batch.pixels[:] = 0  # as the reader may

    def memory(self, batch: SimpleNamespace) -> tuple[int, np.ndarray]:
        return batch.number % self.memories, self.space[batch.number % self.memories]


def batch_of(number: int) -> SimpleNamespace:
    batch = a_batch(4, ids=np.arange(4, dtype=np.int64) + 4 * number)
    names = tuple(f"s/{i}" for i in batch.labels)
    replaced = (Replacement(0, "s", "1", "label", "no number"),) * (number % 2)
    return SimpleNamespace(**vars(batch), number=number, names=names, replaced=replaced, sample_ids=batch.sample_keys,
                           repeats=np.arange(4), epoch=number // 3, retries=0)  # fmt: skip


def augment(device: str = "cpu", labels: bool = True) -> Augment:
    return Augment(Augmentation(), (6, 5), 3, device, train=True, labels=labels)


def feed_of(lender: Lender) -> DeviceFeed[Any]:
    return DeviceFeed(lender, augment(), torch.device("cpu"))


@pytest.fixture(params=[0, 1, 2], ids=["in turn", "ahead", "asked twice"])
def ahead(request: pytest.FixtureRequest) -> int:
    return request.param


def taken(feed: DeviceFeed[Any], ahead: int) -> Iterator[Any]:
    """The feed's batches, each followed by so many calls of run_ahead."""
    for fed in feed:
        yield fed
        for _ in range(ahead):
            feed.run_ahead()


def test_gives_the_loaders_batches_in_order(ahead: int) -> None:
    with feed_of(Lender(end=7)) as feed:
        given = list(taken(feed, ahead))
        assert list(feed) == []
    assert len(given) == 7
    for number, fed in enumerate(given):
        batch = batch_of(number)
        assert (fed.names, fed.replaced, fed.epoch) == (batch.names, batch.replaced, batch.epoch)
        assert (fed.sample_ids.tolist(), fed.repeats.tolist()) == (batch.sample_ids.tolist(), batch.repeats.tolist())
        expected = augment()(batch).inputs()
        assert fed.inputs.keys() == expected.keys() == {"pixel_values", "sample_key", "labels"}
        assert all(torch.equal(fed.inputs[name], expected[name]) for name in expected)


def test_an_error_waits_for_the_batch_that_it_was(ahead: int) -> None:
    feed = feed_of(Lender(bad=2))
    given = taken(feed, ahead)
    assert [next(given).names[0] for _ in range(2)] == ["s/0", "s/4"]
    with pytest.raises(DataError, match="batch is bad"):
        next(given)


def test_a_slow_loader_is_waited_for_by_next_alone() -> None:
    lender = Lender()
    lender.has_next = False
    feed = feed_of(lender)
    feed.run_ahead()
    assert lender.number == 0
    assert next(feed).names == batch_of(0).names
    lender.has_next = True
    feed.run_ahead()
    assert lender.number == 2
    assert next(feed).names == batch_of(1).names


def test_on_a_cpu_memories_go_back_at_once(ahead: int) -> None:
    lender = Lender(end=6)
    for _ in taken(feed_of(lender), ahead):
        assert lender.out == []


def test_seconds_are_those_of_the_loader_and_of_the_augmentation(ahead: int) -> None:
    feed = feed_of(Lender(end=4, seconds=0.02))
    began = time.perf_counter()
    list(taken(feed, ahead))
    elapsed = time.perf_counter() - began
    seconds = feed.read_seconds()
    assert seconds.keys() == {"data", "augment"}
    assert 4 * 0.02 <= seconds["data"] <= elapsed - seconds["augment"]
    assert seconds["augment"] > 0
    assert feed.read_seconds() == {"data": 0, "augment": 0}


class Queued:
    """In place of a GPU's streams: what is queued on either passes when the test says so.

    A mark is [seconds at which it passed or None].
    """

    def __init__(self) -> None:
        self.now, self.marks, self.waited, self.handed, self.pinned = 0.0, [], [], [], []
        self.is_ahead = self.is_closed = False

    @contextmanager
    def ahead(self) -> Iterator[None]:
        self.is_ahead = True
        yield
        self.is_ahead = False

    def mark(self) -> list[Any]:
        self.marks.append([None])
        return self.marks[-1]

    def run(self, seconds: float = 0.0, until: int | None = None) -> None:
        """The device gets through all that is queued, or through the first `until` marks."""
        for mark in self.marks[:until]:
            if mark[0] is None:
                self.now += seconds
                mark[0] = self.now

    def passed(self, mark: list[Any]) -> bool:
        return mark[0] is not None

    def wait(self, mark: list[Any]) -> None:
        self.waited.append(mark)
        self.run(until=next(i for i, each in enumerate(self.marks) if each is mark) + 1)

    def seconds(self, first: list[Any], last: list[Any]) -> float:
        return last[0] - first[0]

    def hand_over(self, ready: list[Any], tensors: Any) -> None:
        self.handed.append((ready, list(tensors)))

    def pin(self, number: int, memory: np.ndarray) -> None:
        self.pinned.append((number, memory))

    def close(self) -> None:
        self.is_closed = True


def test_memories_are_out_until_the_device_has_passed_them() -> None:
    lender = Lender(memories=3)
    feed = feed_of(lender)
    feed._streams = streams = Queued()
    for out in (1, 2, 3):
        feed.run_ahead()
        next(feed)
        assert len(lender.out) == out
    assert streams.waited == []
    oldest = lender.out[0]
    feed.run_ahead()  # nothing is free to be filled, and it does not wait
    assert streams.waited == []
    next(feed)  # this waits, for the oldest and not for the others
    assert len(streams.waited) == 1
    assert len(lender.out) == 3
    assert all(batch is not oldest for batch in lender.out)
    streams.run()
    feed.run_ahead()
    assert len(lender.out) == 1
    assert len(streams.waited) == 1


def test_what_the_device_has_not_reached_is_counted_later() -> None:
    feed = feed_of(Lender())
    feed._streams = streams = Queued()
    next(feed)
    assert feed.read_seconds() == {"data": 0, "augment": 0}
    streams.run(until=1)  # a span has begun
    assert feed.read_seconds() == {"data": 0, "augment": 0}
    streams.run(seconds=1.0)  # a second from mark to mark
    assert feed.read_seconds() == {"data": 2, "augment": 1}  # for the loader, and for the batch's tensors
    assert feed.read_seconds() == {"data": 0, "augment": 0}


def test_tensors_are_handed_over_once_they_are_taken() -> None:
    feed = feed_of(Lender())
    feed._streams = streams = Queued()
    feed.run_ahead()
    assert streams.handed == []
    fed = next(feed)
    ((_, tensors),) = streams.handed
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in fed.inputs.values()}


def test_a_batch_is_augmented_on_the_other_stream_from_pinned_memory() -> None:
    """And the feed's end is that of the streams, with their pins."""
    lender = Lender()
    with feed_of(lender) as feed:
        feed._streams = streams = Queued()
        calls: list[tuple[bool, int]] = []

        def augmenting(batch: SimpleNamespace) -> Any:
            ((number, memory),) = streams.pinned
            assert memory is lender.memory(batch)[1]
            calls.append((streams.is_ahead, number))
            return augment()(batch)

        feed._augment = augmenting  # type: ignore[assignment]
        next(feed)
        assert calls == [(True, 0)]
        assert not streams.is_closed
    assert streams.is_closed
