"""The order of calls in the loop, recorded by an engine and a feed, and the rows that it writes."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.augment.test_feed import Lender, feed_of
from vitscale.config.schema import Log, RunConfig, Train
from vitscale.engine.engine import Inputs, StepResult
from vitscale.engine.guard import Diverged
from vitscale.engine.loop import PeriodicTask, TrainingLoop, TrainState, every_n_steps
from vitscale.engine.ranks import ProcessRanks
from vitscale.engine.schedule import lr_at
from vitscale.errors import DataError
from vitscale.files import retry
from vitscale.tracking.meters import Meters


@pytest.fixture(autouse=True)
def no_retries_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop counts all that its process has made; here other tests' are in it."""
    monkeypatch.setattr(retry, "retries", retry._Count())


CAUSES = ("undecodable", "label")


@dataclass(frozen=True)
class Replaced:
    slot: int
    cause: str


@dataclass(frozen=True)
class Batch:
    number: int
    retries = 0
    replaced: tuple[Replaced, ...] = ()
    shard: str = "shard"

    @property
    def inputs(self) -> Inputs:
        return {"number": torch.tensor(self.number)}

    @property
    def names(self) -> list[str]:
        return [f"{self.shard}/{self.number}a", f"{self.shard}/{self.number}b"]

    @property
    def epoch(self) -> int:
        return self.number // 3


class Feed:
    """Micro-batches 0, 1, ...; `bad` of them have a replaced sample."""

    def __init__(self, events: list[str], bad: Iterable[int], shard: str = "shard") -> None:
        self.events, self.bad, self.shard = events, set(bad), shard
        self.numbers = itertools.count()

    def __next__(self) -> Batch:
        number = next(self.numbers)
        self.events.append(f"batch {number}")
        return Batch(number, (Replaced(0, "undecodable"),) if number in self.bad else (), self.shard)

    def run_ahead(self) -> None:
        self.events.append("run ahead")

    def read_seconds(self) -> dict[str, float]:
        self.events.append("read seconds")
        return {"data": 0.0}


@dataclass
class Engine:
    """Takes every micro-batch's number for its loss; the gradients of `broken` steps are not finite."""

    events: list[str]
    accumulation: int = 2
    broken: tuple[int, ...] = ()
    ranks: ProcessRanks = field(default_factory=lambda: ProcessRanks(timedelta(seconds=1)))
    lrs: list[float] = field(default_factory=list)  # of each step
    tensors: list[weakref.ref[torch.Tensor]] = field(default_factory=list)  # of all inputs that it was given

    def warm_up(self, inputs: Inputs) -> None:
        self.events.append("warm up 0")

    def step(self, micro_batches: Iterable[Inputs], lr: float) -> StepResult:
        self.lrs.append(lr)
        losses = []
        for inputs in micro_batches:
            number = float(inputs["number"]) if "number" in inputs else 0.0
            self.events.append(f"forward {number:.0f}")
            losses.append(number)
            self.tensors += [weakref.ref(tensor) for tensor in inputs.values()]
            del inputs
        self.events.append("update")
        return StepResult(
            sum(losses) / len(losses), {"accuracy": 0.5}, torch.tensor(1.0), len(self.lrs) not in self.broken
        )


@dataclass
class Stop:
    at: int | None = None
    asked: int = 0

    save_at: int | None = None
    saves: int = 0

    def requested(self) -> bool:
        self.asked += 1
        return self.asked == self.at

    def save_requested(self) -> bool:
        return self.asked == self.save_at

    def saving(self, step: int) -> None:
        self.saves += 1


def make_loop(total_steps: int, **parts: Any) -> tuple[TrainingLoop, list[str], list[tuple[str, dict[str, Any]]]]:
    """A loop of these parts, the events that it causes, and the rows that it leaves."""
    events: list[str] = []
    rows: list[tuple[str, dict[str, Any]]] = []
    settings = {name: parts.pop(name) for name in ("trace", "max_bad_fraction", "max_skipped_steps") if name in parts}
    config = RunConfig(
        train=Train(global_batch=4, max_skipped_steps=settings.get("max_skipped_steps", 5)),
        log=Log(trace=settings.get("trace", False)),
    )
    config = replace(config, data=replace(config.data, max_bad_fraction=settings.get("max_bad_fraction", 1.0)))

    def task(name: str, steps: int, at_stop: bool = False) -> PeriodicTask:
        def run(state: TrainState, row: dict[str, Any]) -> None:
            events.append(f"{name} {state.step}")
            row[f"{name}_seen"] = True
            if name == "log":
                rows.append(("metrics.jsonl", dict(row)))

        return PeriodicTask(name, every_n_steps(steps), run, at_stop)

    loop = TrainingLoop(
        engine=Engine(events, **parts.get("engine_parts", {})),  # type: ignore[arg-type]
        feed=parts.get("feed") or Feed(events, parts.get("bad", ())),
        state=parts.get("state", TrainState()),
        total_steps=total_steps,
        config=config,
        tasks=(task("evaluate", 2), task("log", parts.get("log", 1)), task("save", 3, at_stop=True)),
        record=lambda file, row: rows.append((file, row)),
        say=events.append,
        causes=CAUSES,
        stop=Stop(parts.get("stop_at"), save_at=parts.get("save_at")),  # type: ignore[arg-type]
        meters=Meters(),
    )
    return loop, events, rows


def test_a_step_from_top_to_bottom() -> None:
    loop, events, rows = make_loop(1)
    assert loop.run()
    assert events == [
        *("batch 0", "warm up 0", "read seconds"),  # the wait for the first batch is not counted
        *("forward 0", "run ahead", "batch 1", "forward 1", "run ahead", "update", "read seconds"),
        *("evaluate 1", "log 1", "save 1"),  # the last step is always due
    ]
    (_, row) = rows[0]
    assert row | {"time": 0, "lr": 0} == {
        "step": 1, "samples": 4, "epoch": 0, "loss": 0.5, "lr": 0, "accuracy": 0.5, "grad_norm": 1.0,
        "skipped_steps": 0, "spikes": 0, "bad_samples": 0, "data_retries": 0, "time": 0,
        "evaluate_seen": True, "log_seen": True,
    }  # fmt: skip


def test_tasks_are_done_when_due_in_their_order() -> None:
    loop, events, _ = make_loop(7)
    assert loop.run()
    done = [event for event in events if event.split()[0] in ("evaluate", "log", "save")]
    assert done == [
        *("log 1", "evaluate 2", "log 2", "log 3", "save 3", "evaluate 4", "log 4", "log 5"),
        *("evaluate 6", "log 6", "save 6", "evaluate 7", "log 7", "save 7"),
    ]


def test_a_request_to_stop_saves_and_ends_the_loop() -> None:
    loop, events, _ = make_loop(100, stop_at=5)
    assert not loop.run()
    assert (loop.state.step, loop.state.samples) == (5, 20)
    assert events[-3:] == ["read seconds", "log 5", "save 5"]


def test_a_request_to_save_saves_and_goes_on() -> None:
    loop, events, _ = make_loop(4, save_at=1)
    assert loop.run()
    assert [event for event in events if event.startswith("save")] == ["save 1", "save 3", "save 4"]
    assert isinstance(loop.stop, Stop)
    assert loop.stop.saves == 1


def test_a_stop_in_an_evaluation_leaves_it_to_the_next_start() -> None:
    """The rows are those of a run that was never stopped, at the last step too."""

    def run(state: TrainState, stop_at: int | None) -> tuple[TrainingLoop, list[str], list[tuple[str, dict[str, Any]]]]:
        loop, events, rows = make_loop(2, state=state, stop_at=stop_at)
        evaluate, log, save = loop.tasks

        def check_and_evaluate(state: TrainState, row: dict[str, Any]) -> None:
            loop.engine.ranks.check_stop()
            evaluate.run(state, row)

        loop.tasks = (replace(evaluate, run=check_and_evaluate), log, save)
        return loop, events, rows

    loop, events, rows = run(TrainState(), stop_at=3)  # the two steps ask too
    assert not loop.run()
    assert events[-2:] == ["read seconds", "save 2"]
    assert [row["step"] for _, row in rows] == [1]
    kept = json.loads(json.dumps(asdict(loop.state), allow_nan=False))
    assert kept["pending"]["tasks"] == ["evaluate", "log", "save"]

    loop, events, more = run(TrainState(**kept), stop_at=None)
    assert loop.run()
    assert events == ["evaluate 2", "log 2", "save 2"]
    assert loop.state.pending is None
    unbroken, _, expected = run(TrainState(), stop_at=None)
    assert unbroken.run()
    for (_, row), (_, other) in zip(rows + more, expected, strict=True):
        assert {name: row[name] for name in other} | {"time": 0} == other | {"time": 0}


def test_a_resumed_run_goes_on_with_its_counts() -> None:
    state = TrainState(step=3, samples=12, epoch=0, skipped=1, bad={"label": 2})
    loop, _, rows = make_loop(4, state=state, bad=[1])
    assert loop.run()
    assert isinstance(loop.engine, Engine)
    assert loop.engine.lrs == [lr_at(3, 4, loop.config)]
    counted = TrainState(step=4, samples=16, skipped=1, bad={"label": 2, "undecodable": 1}, losses=[0.5])
    assert state == counted
    assert rows[0] == ("quarantine.jsonl", {"step": 4, "slot": 0, "cause": "undecodable"})
    assert (rows[1][1]["skipped_steps"], rows[1][1]["bad_samples"]) == (1, 3)


def test_a_finished_run_takes_no_batch() -> None:
    loop, events, _ = make_loop(3, state=TrainState(step=3))
    assert loop.run()
    assert events == []


def test_names_are_recorded_for_the_trace_and_for_skipped_steps() -> None:
    loop, _, rows = make_loop(2, trace=True, engine_parts={"broken": (2,)})
    assert loop.run()
    first = {"step": 1, "sample_keys": ["shard/0a", "shard/0b", "shard/1a", "shard/1b"]}
    second = {"step": 2, "sample_keys": ["shard/2a", "shard/2b", "shard/3a", "shard/3b"]}
    assert [row for row in rows if row[0] != "metrics.jsonl"] == [
        ("trace.jsonl", first), ("trace.jsonl", second), ("skipped.jsonl", second),
    ]  # fmt: skip
    assert loop.state.skipped == 1


def test_guards_end_the_run_after_their_rows_are_written() -> None:
    loop, events, rows = make_loop(9, bad=range(9), max_bad_fraction=0.0)
    with pytest.raises(DataError, match="4 bad samples"):
        loop.run()
    assert [row["step"] for file, row in rows if file == "quarantine.jsonl"] == [1, 1, 2, 2]
    loop, events, rows = make_loop(9, engine_parts={"broken": (2, 3)}, max_skipped_steps=2)
    with pytest.raises(Diverged, match="step 3: "):
        loop.run()
    assert [row["step"] for file, row in rows if file == "skipped.jsonl"] == [2, 3]
    assert "log 3" not in events


def test_no_batch_is_kept_beyond_its_step() -> None:
    """Nor beyond its backward: when the next one is prepared, its memory is free."""
    feed = feed_of(Lender())
    loop, _, _ = make_loop(3, feed=feed)
    engine, run_ahead = loop.engine, feed.run_ahead
    assert isinstance(engine, Engine)
    alive: list[int] = []

    def count_and_run_ahead() -> None:
        alive.append(sum(tensor() is not None for tensor in engine.tensors))
        run_ahead()

    feed.run_ahead = count_and_run_ahead  # type: ignore[method-assign]
    assert loop.run()
    assert len(engine.tensors) == 3 * 2 * 3  # steps, micro-batches; pixels, keys and labels
    assert alive == [0] * 6


def test_an_error_of_the_next_batch_does_not_end_this_step() -> None:
    loop, events, rows = make_loop(5, feed=feed_of(Lender(bad=4)))
    with pytest.raises(DataError, match="batch is bad"):
        loop.run()
    assert events.count("update") == len([row for file, row in rows if file == "metrics.jsonl"]) == 2


def test_the_epoch_is_that_of_the_first_micro_batch() -> None:
    loop, _, rows = make_loop(3)
    assert loop.run()
    assert [row["epoch"] for _, row in rows] == [0, 0, 1]  # of batches 0, 2 and 4; batch 3 begins epoch 1


def test_rates_and_shares_of_time_of_a_row() -> None:
    loop, _, _ = make_loop(2, feed=feed_of(Lender()))
    rows: list[dict[str, Any]] = []
    loop.tasks = (PeriodicTask("tracking", every_n_steps(1), lambda state, row: rows.append(row | loop.meters.read())),)
    assert loop.run()
    assert len(rows) == 2
    for row in rows:
        assert row["images_per_second"] > 0
        assert 0 < row["augment_share"] < 1
        assert 0 <= row["data_share"] < 1
    assert rows[1].keys() - rows[0].keys() == {"tracking_share"}  # by the task's name
