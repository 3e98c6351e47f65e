"""Python collects garbage at stated steps of the loop alone, and what it leaves until then does not add up."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest

from tests.engine.test_loop import Batch, make_loop
from vitscale.engine import garbage
from vitscale.engine.garbage import Garbage


class Cycle:
    """A megabyte that only the collector frees."""

    def __init__(self) -> None:
        self.itself, self.memory = self, bytearray(1 << 20)


class Feed:
    """Each micro-batch leaves a Cycle, and enough objects for Python to collect by itself; `most`: alive at once."""

    def __init__(self) -> None:
        self.number, self.most, self.cycles = 0, 0, weakref.WeakSet[Cycle]()

    def __next__(self) -> Batch:
        self.number += 1
        self.cycles.add(Cycle())
        for _ in range(20):
            [[number] for number in range(1000)]
        self.most = max(self.most, len(self.cycles))
        return Batch(self.number)

    def run_ahead(self) -> None:
        pass

    def read_seconds(self) -> dict[str, float]:
        return {}


def test_a_loop_collects_at_stated_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step, at every 5th one, and with the tasks of the last."""
    monkeypatch.setattr(garbage, "EVERY", 5)
    feed, at = Feed(), Counter[int]()
    loop, _, _ = make_loop(20, feed=feed, log=100)
    loop.tasks = [task for task in loop.tasks if task.name == "log"]

    def note(phase: str, about: dict[str, Any]) -> None:
        at[loop.state.step] += phase == "start"

    gc.callbacks.append(note)
    try:
        assert loop.run()
    finally:
        gc.callbacks.remove(note)
    at.pop(0, None)  # in the first step Python collects by itself
    assert {step: times for step, times in at.items() if step < 20} == dict.fromkeys((1, 5, 10, 15), 1)
    assert at[20] >= 1
    assert feed.most <= 2 * 6, "what two micro-batches a step leave, of five steps and the one under way"


def test_a_loop_leaves_python_as_it_was() -> None:
    loop, _, _ = make_loop(3)
    assert loop.run()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_so_does_one_that_fails() -> None:
    def fail() -> None:
        with Garbage() as collector:
            collector.stepped()
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_python_collects_by_itself_between_steps() -> None:
    with Garbage() as collector:
        collector.stepped()
        with collector.between():
            assert gc.isenabled()
        assert not gc.isenabled()
