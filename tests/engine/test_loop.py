"""The loop and its feed: who is asked for what, in which order, and what is kept of a batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from tests.augment.test_feed import Lender, feed_of
from vitscale.config.schema import Log, RunConfig, Train
from vitscale.engine.backend import Inputs, StepResult
from vitscale.engine.loop import LoopCalls, TrainState, train
from vitscale.errors import DataError


class Ranks:
    """One rank among itself."""

    world_size = 1

    def sum(self, values: Any) -> Any:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Recorder:
    """An engine that writes down what it is asked for, with what the feed was asked for between."""

    accumulation, ranks = 2, Ranks()

    def __init__(self, feed: Any) -> None:
        self.asked: list[str] = []
        self.pixels: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []
        run_ahead = feed.run_ahead

        def note() -> None:
            self.asked.append("ahead")
            run_ahead()

        feed.run_ahead = note

    def warm_up(self, inputs: Inputs) -> None:
        self.asked.append("warm-up")

    def step(self, micro_batches: Iterable[Inputs], lr: float) -> StepResult:
        for inputs in micro_batches:
            self.asked.append("backward")
            self.pixels.append(weakref.ref(inputs["pixel_values"]))
        del inputs
        self.asked.append("update")
        self.alive.append(sum(pixels() is not None for pixels in self.pixels))
        return StepResult(1.0, {}, 1.0, True)


def run(lender: Lender, steps: int) -> tuple[Recorder, list[dict[str, Any]], DataError | None]:
    """The engine, the rows, and what ended the loop."""
    config = replace(RunConfig(), train=Train(global_batch=8, micro_batch=4, steps=steps), log=Log(every_steps=1))
    rows: list[dict[str, Any]] = []
    calls = LoopCalls(lambda state: None, rows.append, lambda file, row: None)
    feed, stop = feed_of(lender), SimpleNamespace(requested=lambda: False)
    engine = Recorder(feed)
    error = None
    try:
        train(engine, feed, TrainState(), steps, config, calls, stop)
    except DataError as caught:
        error = caught
    return engine, rows, error


def test_the_feed_runs_ahead_after_each_backward_and_before_the_update() -> None:
    engine, rows, error = run(Lender(), steps=2)
    assert error is None
    assert engine.asked == ["warm-up", *["backward", "ahead", "backward", "ahead", "update"] * 2]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["augment_share"] < 1
        assert 0 <= row["data_share"] < 1


def test_no_batch_is_kept_beyond_its_step() -> None:
    engine, _, _ = run(Lender(), steps=3)
    assert len(engine.pixels) == 6
    assert engine.alive == [0, 0, 0]


def test_an_error_of_the_next_batch_does_not_end_this_step() -> None:
    engine, rows, error = run(Lender(bad=4), steps=5)
    assert str(error) == "batch is bad"
    assert engine.asked.count("update") == len(rows) == 2
