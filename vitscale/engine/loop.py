"""The training loop: take a step, agree on it, then once in a while evaluate, log, save; stop if asked to.

All that it knows of the model is that its forward returns a loss, of the data that micro-batches come, and of
the periodic tasks when they are due.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from vitscale.config.schema import RunConfig
from vitscale.engine.engine import Engine, Inputs, StepResult
from vitscale.engine.guard import SampleGuard, StepGuard
from vitscale.engine.preempt import StopRequest
from vitscale.engine.ranks import ProcessRanks
from vitscale.engine.schedule import lr_at
from vitscale.faults import fault_point
from vitscale.files import retry
from vitscale.tracking.meters import Meters
from vitscale.tracking.startup import StartUp

Row = dict[str, Any]


class MicroBatch(Protocol):
    """One forward's worth of samples on this rank."""

    @property
    def inputs(self) -> Inputs:
        """The model's keyword arguments, on the device."""

    @property
    def names(self) -> Sequence[str]:
        """SHARD/KEY of each sample, by slot."""

    @property
    def replaced(self) -> Sequence[Any]:
        """Dataclasses of the bad samples that others stood in for, each with a `cause`."""

    @property
    def retries(self) -> int:
        """Reads of storage that failed and were made again."""

    @property
    def epoch(self) -> int:
        """Of its first sample: a mixture's sources may be in several."""


class Feed(Protocol):
    """Where micro-batches come from, without end."""

    def __next__(self) -> MicroBatch: ...

    def run_ahead(self) -> None:
        """Start on the next one, now that the device has work; what goes wrong is raised by the `next()` for it."""

    def read_seconds(self) -> Mapping[str, float]:
        """Seconds since the last call, by what they were spent on: `data`, that steps waited for it, and others."""


@dataclass
class TrainState:
    """Where a run stands: what a checkpoint's manifest holds of the loop."""

    step: int = 0  # optimizer steps taken, skipped ones included
    samples: int = 0  # global samples consumed
    shift: int = 0  # what `samples` is short of the position in the order, since other shards began a new epoch
    epoch: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    bad: dict[str, int] = field(default_factory=dict)  # replaced samples by cause
    retries: int = 0  # reads of storage that failed and were made again
    save_failures: int = 0  # checkpoints that could not be saved
    elapsed_s: float = 0.0  # seconds of training behind it, over all starts
    best: dict[str, Any] | None = None  # of train.keep_best: its `metric`, `value` and `step`
    without_better: int = 0  # validations since then
    early_stopped: bool = False  # then there is nothing more to train

    def is_done(self, total_steps: int) -> bool:
        return self.early_stopped or self.step >= total_steps


@dataclass(frozen=True)
class StepReport(StepResult):
    """What one step gave: on one rank, or by `reduced` on all ranks together.

    `grad_norm` and `applied` are the same on every rank.
    """

    bad: dict[str, int]  # replaced samples by cause; every cause there is
    stop: bool  # whether any rank was asked to stop
    retries: int = 0  # reads of storage that were made again

    def reduced(self, ranks: ProcessRanks) -> StepReport:
        """The report of all ranks, the same on each of them. A collective: one exchange."""
        metrics = {f"metric {name}": value for name, value in self.metrics.items()}
        bad = {f"bad {cause}": count for cause, count in self.bad.items()}
        sums = ranks.sum({"loss": self.loss, "stop": self.stop, "retries": self.retries, **metrics, **bad})
        return replace(
            self,
            loss=sums["loss"] / ranks.world_size,
            metrics={name: sums[f"metric {name}"] / ranks.world_size for name in self.metrics},
            bad={cause: int(sums[f"bad {cause}"]) for cause in self.bad},
            stop=sums["stop"] > 0,
            retries=int(sums["retries"]),
        )


@dataclass(frozen=True)
class PeriodicTask:
    """What every rank does once in a while, all at the same step."""

    name: str  # what its share of the time is called
    due: Callable[[int], bool]  # at which steps; the last one is always among them
    run: Callable[[TrainState, Row], None]  # it may add to the row of metrics.jsonl, which a later task writes
    at_stop: bool = False  # also before the run stops at a step that is not the last


def every_n_steps(n: int) -> Callable[[int], bool]:
    """For `PeriodicTask.due`: at the multiples of n."""
    return lambda step: step % n == 0


@dataclass
class TrainingLoop:
    """Training from `state` to `total_steps` with these parts."""

    engine: Engine
    feed: Feed
    state: TrainState
    total_steps: int
    config: RunConfig
    tasks: Sequence[PeriodicTask]  # done in this order: evaluate, log, save (a row before its checkpoint)
    record: Callable[[str, Row], None]  # (file, row) of a JSONL file beside metrics.jsonl; only rank 0's counts
    causes: Sequence[str]  # why a sample can be bad
    stop: StopRequest
    meters: Meters
    startup: StartUp = field(default_factory=StartUp)
    _waiting: list[MicroBatch] = field(default_factory=list, init=False)  # of the warm-up; the first step takes it
    _retries_told: int = field(default=0, init=False)  # of those that this process itself made

    def run(self) -> bool:
        """Train from `state` to `total_steps`, or until a task ends it early; False when asked to stop before.

        Raises Diverged or DataError at the guards' limits, on all ranks at once.
        """
        state, batch = self.state, self.config.train.global_batch
        step_guard = StepGuard(self.config.train.max_skipped_steps, state.skipped)
        sample_guard = SampleGuard(self.config.data.max_bad_fraction, state.bad)
        if not state.is_done(self.total_steps):
            self._waiting.append(next(self.feed))
            self.startup.done("first batch")
            self.engine.warm_up(self._waiting[0].inputs)
            self.feed.read_seconds()  # the wait for the first batch is the start's
        while not state.is_done(self.total_steps):
            lr = lr_at(state.step, self.total_steps, self.config)
            result, consumed = self._step(lr)
            self.startup.end("first step")
            report = self._report(result, consumed).reduced(self.engine.ranks)
            state.step += 1
            state.samples += batch
            state.epoch = consumed[0].epoch
            state.retries += report.retries
            self._record(report, consumed)
            fault_point("step")
            if any(report.bad.values()):
                sample_guard.note(report.bad, state.samples, partial(self._example, consumed))
                state.bad = dict(sample_guard.counts)
            step_guard.note(state.step, report.applied)
            state.skipped = step_guard.skipped
            row = _row(state, report, lr)
            for task in self.tasks:
                at_end = state.is_done(self.total_steps) or (report.stop and task.at_stop)
                if at_end or task.due(state.step):
                    with self.meters.measure(task.name):
                        task.run(state, row)
            if report.stop:
                break
        return state.is_done(self.total_steps)

    def _step(self, lr: float) -> tuple[StepResult, list[Consumed]]:
        """One optimizer step on this rank; also what is known of the micro-batches it took."""
        consumed: list[Consumed] = []

        def pull() -> Iterator[Inputs]:
            for _ in range(self.engine.accumulation):
                micro_batch = self._waiting.pop() if self._waiting else next(self.feed)
                consumed.append(
                    Consumed(micro_batch.names, micro_batch.replaced, micro_batch.epoch, micro_batch.retries)
                )
                yield micro_batch.inputs
                del micro_batch  # its backward is queued: nothing of it is needed while the next one is prepared
                self.feed.run_ahead()

        result = self.engine.step(pull(), lr)
        self.meters.count(self.config.train.global_batch)
        self.meters.add(self.feed.read_seconds())
        return result, consumed

    def _report(self, result: StepResult, consumed: Sequence[Consumed]) -> StepReport:
        """What the step gave on this rank."""
        bad = Counter(replaced.cause for micro_batch in consumed for replaced in micro_batch.replaced)
        counts = {cause: bad[cause] for cause in self.causes}
        retries = sum(micro_batch.retries for micro_batch in consumed)
        own, self._retries_told = int(retry.retries) - self._retries_told, int(retry.retries)  # index and tables
        return StepReport(**vars(result), bad=counts, stop=self.stop.requested(), retries=retries + own)

    def _record(self, report: StepReport, consumed: Sequence[Consumed]) -> None:
        """The rows that a step leaves beside metrics.jsonl: its samples' names, its replaced samples."""
        step = self.state.step
        files = ["trace.jsonl"] * self.config.log.trace + ["skipped.jsonl"] * (not report.applied)
        if files:
            names = self._collect([name for micro_batch in consumed for name in micro_batch.names])
            for file in files:
                self.record(file, {"step": step, "sample_keys": names})
        if any(report.bad.values()):
            local = [asdict(replaced) for micro_batch in consumed for replaced in micro_batch.replaced]
            for replaced in self._collect(local):
                self.record("quarantine.jsonl", {"step": step, **replaced})

    def _example(self, consumed: Sequence[Consumed]) -> str:
        """One of the samples that the step replaced, on whichever rank, and the reason."""
        local = [replaced for micro_batch in consumed for replaced in micro_batch.replaced]
        examples = self.engine.ranks.gather(str(local[0]) if local else None)
        return next(filter(None, examples))

    def _collect(self, items: list[Any]) -> list[Any]:
        """The items of all ranks in slot order, on rank 0; nothing on the others."""
        return list(itertools.chain(*self.engine.ranks.collect(items)))


@dataclass(frozen=True)
class Consumed:
    """What a step's records need of a micro-batch after its forward: not its tensors."""

    names: Sequence[str]
    replaced: Sequence[Any]
    epoch: int
    retries: int


def _row(state: TrainState, report: StepReport, lr: float) -> Row:
    """A row of metrics.jsonl, before the tasks add to it."""
    return {
        "step": state.step,
        "samples": state.samples,
        "epoch": state.epoch,
        "loss": report.loss,
        "lr": lr,
        **report.metrics,
        "grad_norm": report.grad_norm,
        "skipped_steps": state.skipped,
        "bad_samples": sum(state.bad.values()),
        "data_retries": state.retries,
        "time": int(time.time() * 1000),
    }
