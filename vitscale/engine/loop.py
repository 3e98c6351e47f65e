"""The training loop: take a step, agree on it, then once in a while evaluate, log, save; stop if asked to.

All that it knows of the model is that its forward returns a loss, of the data that micro-batches come, and of
the periodic tasks when they are due.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from vitscale import heartbeat
from vitscale.config.schema import RunConfig
from vitscale.engine.engine import Engine, Inputs, StepResult
from vitscale.engine.exchange import Consumed, StepDetails, StepExchange
from vitscale.engine.garbage import Garbage
from vitscale.engine.guard import SampleGuard, SpikeGuard, StepGuard
from vitscale.engine.preempt import StopRequest, StopRequested
from vitscale.engine.schedule import lr_at
from vitscale.faults import fault_point
from vitscale.files import retry
from vitscale.tracking.jsonl import as_json
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
    skipped_in_a_row: int = 0  # of these, those up to this step
    spikes: int = 0  # steps whose loss was far above those before them
    spikes_in_a_row: int = 0  # of these, those up to this step
    losses: list[float] = field(default_factory=list)  # of the last steps, finite ones, by which a spike is told
    bad: dict[str, int] = field(default_factory=dict)  # replaced samples by cause
    retries: int = 0  # reads of storage that failed and were made again
    save_failures: int = 0  # checkpoints that could not be saved
    elapsed_s: float = 0.0  # seconds of training behind it, over all starts
    best: dict[str, Any] | None = None  # of train.keep_best: its `metric`, `value` and `step`
    without_better: int = 0  # validations since then
    early_stopped: bool = False  # then there is nothing more to train
    pending: dict[str, Any] | None = None  # of a step whose evaluation was broken off: its `row`, the `tasks` to do
    save_seconds: float = 0.0  # that the last save took, on rank 0

    def is_done(self, total_steps: int) -> bool:
        return self.pending is None and (self.early_stopped or self.step >= total_steps)


@dataclass(frozen=True)
class PeriodicTask:
    """What every rank does once in a while, all at the same step."""

    name: str  # what its share of the time is called
    due: Callable[[int], bool]  # at which steps; the last one is always among them
    run: Callable[[TrainState, Row], None]  # it may add to the row of metrics.jsonl, which a later task writes
    at_stop: bool = False  # also before the run stops at a step that is not the last, and when someone asks for it


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
    say: Callable[[str], None]  # a line on the terminal; only rank 0's counts
    causes: Sequence[str]  # why a sample can be bad
    stop: StopRequest
    meters: Meters
    startup: StartUp = field(default_factory=StartUp)
    _waiting: list[MicroBatch] = field(default_factory=list, init=False)  # of the warm-up; the first step takes it
    _retries_told: int = field(default=0, init=False)  # of those that this process itself made

    def __post_init__(self) -> None:
        state, ranks = self.state, self.engine.ranks
        self._exchange = StepExchange(ranks, self.causes)
        self._details = StepDetails(ranks, self.record, self.config.log.trace)
        self._steps = StepGuard(self.config.train.max_skipped_steps, state.skipped, state.skipped_in_a_row)
        self._samples = SampleGuard(self.config.data.max_bad_fraction, state.bad)
        deviations, ends = self.config.guard.spike_deviations, self.config.guard.rollback
        self._spikes = SpikeGuard(deviations, state.losses, state.spikes, state.spikes_in_a_row, ends)

    def run(self) -> bool:
        """Train from `state` to `total_steps`, or until a task ends it early; False when asked to stop before.

        What the ranks tell each other of a step is on its way during the next one. All of it is there before a row
        or a checkpoint. Raises Diverged or DataError at the guards' limits, on all ranks at once.
        """
        state = self.state
        self.engine.ranks.stop_requested = self.stop.requested
        if state.pending is not None and self._finish_pending(state.pending):
            return False
        if not state.is_done(self.total_steps):
            self._waiting.append(next(self.feed))
            self.startup.done("first batch")
            self.engine.warm_up(self._waiting[0].inputs)
            self.feed.read_seconds()  # the wait for the first batch is the start's
        with Garbage() as garbage:
            return self._train(garbage)

    def _train(self, garbage: Garbage) -> bool:
        """Take the steps; see `run`."""
        state, batch = self.state, self.config.train.global_batch
        stops = False
        while not stops and not state.is_done(self.total_steps):
            lr = lr_at(state.step, self.total_steps, self.config)
            result, consumed = self._step(lr)
            self.startup.end("first step")
            wishes = self._agree()  # on the step before
            state.step += 1
            heartbeat.stepped(state.step)
            state.samples += batch
            state.epoch = consumed[0].epoch
            self._tell(result, consumed)
            fault_point("step", self._common)
            garbage.stepped()
            if wishes or state.is_done(self.total_steps) or any(task.due(state.step) for task in self.tasks):
                with garbage.between():
                    wishes |= self._settle()
                    stops = self._run_tasks(self._row(result, lr), partial(self._is_due, wishes)) or "stop" in wishes
                    if "save" in wishes:
                        self.stop.saving(state.step)
        return state.is_done(self.total_steps)

    def _common(self) -> Iterator[Any]:
        """The tensors that all ranks hold the same bits of, for a fault point."""
        return (tensor for _, tensor in self.engine.replicated())

    def _is_due(self, wishes: Collection[str], task: PeriodicTask) -> bool:
        return (task.at_stop and bool(wishes)) or self.state.is_done(self.total_steps) or task.due(self.state.step)

    def _run_tasks(self, row: Row, is_due: Callable[[PeriodicTask], bool]) -> bool:
        """Do what is due after a step. True where the run was asked to stop meanwhile: what is left waits in the
        checkpoint for the next start."""
        for place, task in enumerate(self.tasks):
            if not is_due(task):
                continue
            try:
                with self.meters.measure(task.name), heartbeat.phase(task.name):
                    task.run(self.state, row)
            except StopRequested:
                names = [each.name for each in self.tasks[place:] if is_due(each)]
                self.state.pending = {"row": as_json(row | self.meters.read()), "tasks": names}
                self._run_tasks(row, lambda each: each.at_stop)
                return True
        return False

    def _finish_pending(self, pending: Row) -> bool:
        """Do what was left of the step before the last stop, and save it; whether the run was asked to stop again."""
        self.state.pending = None
        return self._run_tasks(pending["row"], lambda task: task.at_stop or task.name in pending["tasks"])

    def _step(self, lr: float) -> tuple[StepResult, list[Consumed]]:
        """One optimizer step on this rank; also what is known of the micro-batches it took."""
        consumed: list[Consumed] = []

        def pull() -> Iterator[Inputs]:
            for _ in range(self.engine.accumulation):
                with heartbeat.phase("data"):
                    micro_batch = self._waiting.pop() if self._waiting else next(self.feed)
                consumed.append(
                    Consumed(micro_batch.names, micro_batch.replaced, micro_batch.epoch, micro_batch.retries)
                )
                fault_point("batch", micro_batch.inputs.values)
                yield micro_batch.inputs
                del micro_batch  # its backward is queued: nothing of it is needed while the next one is prepared
                self.feed.run_ahead()

        result = self.engine.step(pull(), lr)
        self.meters.count(self.config.train.global_batch)
        self.meters.add(self.feed.read_seconds())
        return result, consumed

    def _tell(self, result: StepResult, consumed: Sequence[Consumed]) -> None:
        """Start to tell the others of this step; what all ranks know alike is counted at once."""
        step, wishes = self.state.step, {"stop": self.stop.requested(), "save": self.stop.save_requested()}
        own, self._retries_told = int(retry.retries) - self._retries_told, int(retry.retries)  # index and tables
        self._exchange.start(step, result.loss, wishes, consumed, own)
        self._details.add(step, consumed, result.applied)
        self._steps.note(step, result.applied, self._settle)
        self.state.skipped, self.state.skipped_in_a_row = self._steps.skipped, self._steps.in_a_row

    def _agree(self) -> frozenset[str]:
        """Take what the ranks told each other last, if there is something new: the wishes of any of them."""
        agreed, state = self._exchange.finish(), self.state
        if agreed is None:
            return frozenset()
        state.retries += agreed.retries
        if any(agreed.bad.values()):
            self._details.expect()
            self._samples.note(agreed.bad, state.samples, self._example)
            state.bad = dict(self._samples.counts)
        if line := self._spikes.note(agreed.step, agreed.loss, self._details.write):
            self.say(line)
        state.spikes, state.spikes_in_a_row = self._spikes.spikes, self._spikes.in_a_row
        return agreed.wishes

    def _settle(self) -> frozenset[str]:
        """Finish what is pending, before a row, a checkpoint or the end: the wishes of any rank."""
        wishes = self._agree()
        self._details.write()
        return wishes

    def _example(self) -> str:
        """One of the samples that were replaced last, and the reason; the rows of all of them are written."""
        example = self._details.example()
        self._details.write()
        return example

    def _row(self, result: StepResult, lr: float) -> Row:
        """A row of metrics.jsonl, before the tasks add to it; its means have the same bits on every rank."""
        state, ranks = self.state, self.engine.ranks
        sums = ranks.sum({"loss": result.loss} | {f"metric {name}": value for name, value in result.metrics.items()})
        return {
            "step": state.step,
            "samples": state.samples,
            "epoch": state.epoch,
            "loss": sums["loss"] / ranks.world_size,
            "lr": lr,
            **{name: sums[f"metric {name}"] / ranks.world_size for name in result.metrics},
            "grad_norm": float(result.grad_norm),
            "skipped_steps": state.skipped,
            "spikes": state.spikes,
            "bad_samples": sum(state.bad.values()),
            "data_retries": state.retries,
            "time": int(time.time() * 1000),
        }
