"""`vitscale replay RUN --step N`: a step of a run taken again, to see where a value is not finite first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitscale.augment.feed import DeviceFeed
from vitscale.checkpoint.store import Checkpoint, SoleRank, checkpoint_folders, open_checkpoint
from vitscale.config.check import check_config
from vitscale.config.load import load_config
from vitscale.config.schema import RunConfig
from vitscale.engine.engine import Engine, Inputs, StepResult, load_weights
from vitscale.engine.loop import MicroBatch
from vitscale.engine.preempt import StopRequest
from vitscale.engine.schedule import lr_at
from vitscale.errors import CheckpointError, VitscaleError
from vitscale.run.finetune import Finetune
from vitscale.run.job import Job
from vitscale.run.session import Session, open_session
from vitscale.run_folder import RunFolder
from vitscale.text import listed, to_stderr
from vitscale.tracking.jsonl import JsonlFile
from vitscale.tracking.startup import StartUp
from vitscale.world import World


class _TakenBack(RunFolder):
    """A run's folder as it was before the run last went back."""

    def rollbacks(self) -> list[dict[str, Any]]:
        return super().rollbacks()[:-1]


def replay(path: Path, step: int, world: World, taken_back: bool = False) -> str:
    """What step `step` of the run in a folder comes to, taken again from the newest checkpoint before it.

    The same global batches, by accumulation, at ZeRO stage 0 and not compiled, so equal to float order. Nothing is
    written. taken_back: with the batches that were left out when the run last went back. Raises VitscaleError where
    there is no such run or step, or no checkpoint to start from.
    """
    folder = RunFolder(path)
    if not folder.config.exists():
        raise VitscaleError(f"{path}: is no run folder (no config.yaml in it); name the folder RUN_DIR/NAME")
    last = folder.rollbacks()[-1] if folder.rollbacks() else None
    if taken_back:
        if last is None or not last["back_to_step"] < step <= last["step"]:
            span = "never" if last is None else f"from step {last['step']} to {last['back_to_step']}"
            raise VitscaleError(f"--step {step} --taken-back: {path} went back {span}; leave out --taken-back")
        folder = _TakenBack(path)
    elif last is not None and last["back_to_step"] < step <= last["step"]:
        to_stderr(f"replay: the run once went back before step {step}; as it was then: --taken-back")
    checkpoint = _checkpoint_before(folder, step)
    config = _alone(load_config(folder.config))
    check_config(config, world)
    kind = Finetune if checkpoint.state.get("job") == Finetune.__name__ else Job
    job = kind(config, world)
    job.folder = folder  # which may have been moved
    session = open_session(
        job.config, world, folder, StartUp(), StopRequest(folder, world), job.look_at_data, job.adapts
    )
    try:
        return _replayed(job, session, checkpoint, step)
    finally:
        session.backend.close()


def _checkpoint_before(folder: RunFolder, step: int) -> Checkpoint:
    """The newest one whose next step, or a later one, is `step`."""
    root = folder.checkpoints
    steps = {int(path.name.rpartition("_")[2]): path for path in checkpoint_folders(root)}
    before = [saved for saved in steps if saved < step]
    if not before:
        raise CheckpointError(
            f"--step {step}: {root} has no checkpoint before it ({listed(sorted(steps)) or 'none at all'}); take a "
            "later step, or keep more by checkpoint.keep"
        )
    return open_checkpoint(steps[max(before)], SoleRank())


def _alone(config: RunConfig) -> RunConfig:
    """The config for one process whose modules are as they are written."""
    parallel = replace(config.parallel, zero_stage=0, offload_optimizer=False)
    train = replace(config.train, compile=False, gradient_checkpointing=False)
    return replace(config, parallel=parallel, train=train)


def _replayed(job: Job, session: Session, checkpoint: Checkpoint, step: int) -> str:
    config = session.config
    model = job.build(session, drawn=False)
    load_weights(model, checkpoint)
    engine = job.engine(session, model)
    engine.restore(checkpoint)
    state = checkpoint.state
    if step > session.total_steps:
        raise VitscaleError(f"--step {step}: the run has {session.total_steps} steps; name one of them")
    recorded = _losses(job.folder)
    to_stderr(f"replay: from {checkpoint.folder}, {step - checkpoint.step} step(s)")
    with (
        job.loader(session, state["samples"] + state["shift"]) as loader,
        DeviceFeed(loader, job.augment(session), engine.device) as feed,
    ):
        for number in range(checkpoint.step + 1, step + 1):
            finder = Finder(engine.module if number == step else nn.Module())
            lr = lr_at(number - 1, session.total_steps, config)
            result = _step(engine, feed, lr, finder)
            line = f"step {number}: {_outcome(result)}"
            if number in recorded:
                line += f" (the run had a loss of {recorded[number]:.6g})"
            if number < step:
                to_stderr(line)
    return f"{line}\n{finder.told or 'every value of the forwards and every gradient is finite'}"


def _losses(folder: RunFolder) -> dict[int, float]:
    """By step, of the course that is taken again: the rows of the one before stay until the run goes on."""
    last = (RunFolder(folder.path).rollbacks() or [{"back_to_step": -1, "time": 0}])[-1]
    earlier = isinstance(folder, _TakenBack)
    return {
        row["step"]: float(row["loss"])
        for row in JsonlFile(folder.metrics).rows()
        if row["step"] <= last["back_to_step"] or (row["time"] < last["time"]) == earlier
    }


def _step(engine: Engine, feed: DeviceFeed[Any], lr: float, finder: Finder) -> StepResult:
    def pull() -> Iterator[Inputs]:
        for number in range(engine.accumulation):
            micro_batch: MicroBatch = next(feed)
            finder.next(number, micro_batch)
            yield micro_batch.inputs

    return engine.step(pull(), lr)


def _outcome(result: StepResult) -> str:
    skipped = "" if result.applied else ", skipped"
    return f"loss {result.loss:.6g}, gradient norm {float(result.grad_norm):.6g}{skipped}"


class Finder:
    """Looks at what each module gives, and at each parameter's gradient, until one is not finite: `told`."""

    def __init__(self, module: nn.Module) -> None:
        self.told: str | None = None
        self._where = ""
        self._names: Sequence[str] = ()
        for name, part in module.named_modules():
            part.register_forward_hook(self._hook(name or type(module).__name__))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient_hook(name))

    def next(self, number: int, micro_batch: MicroBatch) -> None:
        """The micro-batch that comes now; its own values are looked at."""
        self._where, self._names = f"micro-batch {number + 1}", micro_batch.names
        for name, value in micro_batch.inputs.items():
            self._look(f"the input {name}", value)

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for value in _tensors(output):
                self._look(f"the output of {name}", value)

        return look

    def _gradient_hook(self, name: str) -> Any:
        def look(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            self._look(f"the forward is finite, and in the backward the gradient of {name}", parameter.grad, False)

        return look

    def _look(self, what: str, value: torch.Tensor, by_sample: bool = True) -> None:
        if self.told is not None or not value.is_floating_point() or bool(torch.isfinite(value).all()):
            return
        names, which = list(self._names), "one of its samples, or all together"
        if by_sample and value.ndim and len(value) == len(names):
            bad = ~torch.isfinite(value.detach().flatten(1) if value.ndim > 1 else value.detach()[:, None]).all(dim=1)
            names = [name for name, is_bad in zip(names, bad.tolist(), strict=True) if is_bad]
            which = f"{len(names)} of its {len(self._names)} samples"
        self.told = f"{self._where}: {what} is not finite first, for {which}: {listed(names, 16)}"


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of a module's output, whatever they are packed in."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
