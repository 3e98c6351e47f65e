"""The training loop: take a step, agree on it, then once in a while log, save, stop.

It knows of the model only that its forward returns a loss, of the data only that micro-batches come,
of checkpoints and tracking only the two calls that `LoopCalls` names.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from vitscale.config.schema import RunConfig
from vitscale.engine.backend import Engine, Inputs, StepResult
from vitscale.engine.guard import SampleGuard, StepGuard
from vitscale.engine.preempt import StopRequest
from vitscale.engine.schedule import lr_at
from vitscale.tracking.meters import Meters


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
    def epoch(self) -> int: ...


class Feed(Protocol):
    """Where micro-batches come from, without end."""

    def __next__(self) -> MicroBatch: ...

    def run_ahead(self) -> None:
        """Start on the next one; what goes wrong with it is raised by the `next()` that asks for it."""

    def read_seconds(self) -> dict[str, float]:
        """Seconds since the last call: waited for data, and others by their names."""


@dataclass(frozen=True)
class Taken:
    """What is kept of a micro-batch after its forward: not its tensors."""

    names: Sequence[str]
    replaced: Sequence[Any]
    epoch: int


@dataclass
class TrainState:
    """Where a run stands: what a checkpoint's manifest holds of the loop."""

    step: int = 0  # optimizer steps taken, skipped ones included
    samples: int = 0  # global samples consumed: the data position
    epoch: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    bad: dict[str, int] = field(default_factory=dict)  # replaced samples by cause


@dataclass(frozen=True)
class LoopCalls:
    """What the loop asks of its surroundings, on every rank unless said otherwise."""

    save: Callable[[TrainState], None]
    log: Callable[[dict[str, Any]], None]  # a row of metrics.jsonl; rank 0 only
    record: Callable[[str, dict[str, Any]], None]  # (file, row) of another JSONL file; rank 0 only


def train(
    engine: Engine,
    feed: Feed,
    state: TrainState,
    total_steps: int,
    config: RunConfig,
    calls: LoopCalls,
    stop: StopRequest,
) -> bool:
    """Train from `state` to `total_steps`; True when it got there, False when asked to stop before.

    A checkpoint of the last step is there on return either way. Raises Diverged or DataError at the
    guards' limits, on all ranks at once.
    """
    steps = StepGuard(config.train.max_skipped_steps, state.skipped)
    samples = SampleGuard(config.data.max_bad_fraction, state.bad)
    saved_at = state.step
    waiting: list[MicroBatch] = []  # what the warm-up has taken and no step yet
    if state.step < total_steps:
        waiting.append(next(feed))
        engine.warm_up(waiting[0].inputs)
        feed.read_seconds()  # the wait for the first batch is the start's
    meters = Meters()
    while state.step < total_steps:
        lr = lr_at(state.step, total_steps, config)
        micro_batches, result = _step(engine, feed, waiting, lr)
        meters.count(config.train.global_batch)
        state.step += 1
        state.samples += config.train.global_batch
        state.epoch = micro_batches[0].epoch
        row, stopping, bad = _agree(engine, result, micro_batches, stop.requested())
        if config.log.trace:
            _record_names(engine, calls, "trace.jsonl", state.step, micro_batches)
        if bad:
            causes = _record_replaced(engine, calls, state.step, micro_batches)
            samples.note(causes, state.samples)
            state.bad = dict(samples.counts)
        if not result.applied:
            _record_names(engine, calls, "skipped.jsonl", state.step, micro_batches)
        steps.note(state.step, result.applied)
        state.skipped = steps.skipped
        if state.step % config.log.every_steps == 0 or state.step == total_steps:
            # Before saving: a checkpoint never knows of a step that metrics.jsonl does not.
            with meters.measure("tracking"):
                for what, seconds in feed.read_seconds().items():
                    meters.add(what, seconds)
                calls.log(_row(state, row, lr, meters.read()))
        if state.step % config.checkpoint.every_steps == 0 or state.step == total_steps or stopping:
            with meters.measure("save"):
                calls.save(state)
            saved_at = state.step
        if stopping:
            break
    assert saved_at == state.step
    return state.step >= total_steps


def _step(
    engine: Engine, feed: Feed, waiting: list[MicroBatch], lr: float
) -> tuple[list[Taken], StepResult]:
    """One optimizer step; also the micro-batches it took."""
    taken: list[Taken] = []

    def pull() -> Iterator[Inputs]:
        for _ in range(engine.accumulation):
            batch = waiting.pop() if waiting else next(feed)
            taken.append(Taken(batch.names, batch.replaced, batch.epoch))
            yield batch.inputs
            del batch
            feed.run_ahead()  # its backward is queued: the next one's copy and augmentation go beside it

    return taken, engine.step(pull(), lr)


def _agree(
    engine: Engine, result: StepResult, micro_batches: Sequence[Taken], stop: bool
) -> tuple[dict[str, float], bool, int]:
    """One exchange at a step's end: (means over the ranks, whether any wants to stop, bad samples)."""
    names = sorted(result.metrics)
    bad = sum(len(batch.replaced) for batch in micro_batches)
    mine = np.array([stop, bad, result.loss, *(result.metrics[name] for name in names)], dtype=np.float64)
    every = engine.ranks.sum(mine)
    means = every[2:] / engine.ranks.world_size
    row = {"loss": float(means[0])} | dict(zip(names, map(float, means[1:]), strict=True))
    row["grad_norm"] = result.grad_norm
    return row, bool(every[0] > 0), int(every[1])


def _record_names(
    engine: Engine, calls: LoopCalls, file: str, step: int, micro_batches: Sequence[Taken]
) -> None:
    """A line with the sample keys of the global batch, in slot order."""
    by_rank = engine.ranks.gather([name for batch in micro_batches for name in batch.names])
    calls.record(file, {"step": step, "sample_keys": list(itertools.chain(*by_rank))})


def _record_replaced(engine: Engine, calls: LoopCalls, step: int, micro_batches: Sequence[Taken]) -> list[str]:
    """A line a replaced sample of any rank; returns their causes."""
    mine = [asdict(replaced) for batch in micro_batches for replaced in batch.replaced]
    every = list(itertools.chain(*engine.ranks.gather(mine)))
    for replaced in every:
        calls.record("quarantine.jsonl", {"step": step, **replaced})
    return [replaced["cause"] for replaced in every]


def _row(state: TrainState, row: dict[str, float], lr: float, speed: dict[str, float]) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    counts = {"skipped_steps": state.skipped, "bad_samples": sum(state.bad.values())}
    where = {"step": state.step, "samples": state.samples, "epoch": state.epoch}
    return {**where, "loss": row.pop("loss"), "lr": lr, **row, **speed, **counts, "time": int(time.time() * 1000)}
