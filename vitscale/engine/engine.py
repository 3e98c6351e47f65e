"""A model in training, whatever wraps it: optimizer steps, evaluation, its state saved and restored.

ddp.py and zero.py compute and apply gradients; zero_state.py knows where the state is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vitscale.checkpoint.fragments import Piece, Reserve, arrays_in, new_memory
from vitscale.checkpoint.store import Checkpoint
from vitscale.config.schema import RunConfig
from vitscale.config.step import accumulation
from vitscale.engine import zero_state
from vitscale.engine.ema import Ema
from vitscale.engine.optim import ScaledAdamW, fill_state, make_optimizer, scaled_runs
from vitscale.engine.ranks import ProcessRanks
from vitscale.engine.whole import Inputs, Measure, T, sum_measures
from vitscale.errors import CheckpointError
from vitscale.text import listed
from vitscale.world import World


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, on this rank."""

    loss: float  # mean over this rank's samples
    metrics: dict[str, float]  # likewise
    grad_norm: torch.Tensor  # one element, on the device: of the global gradient before clipping, inf or nan included
    applied: bool  # False: the gradient was not finite and the weights are as before


class Engine:
    """A model in training: optimizer steps, evaluation between them, snapshots of its state and their return."""

    stage: int
    model: nn.Module  # as wrapped
    optimizer: Any  # torch's at stage 0, DeepSpeed's ZeRO optimizer above

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        config: RunConfig,
        world: World,
        ranks: ProcessRanks,
        lr_scales: Mapping[str, float],
        undecayed: Container[str],
    ) -> None:
        self.accelerator = accelerator
        self.module = model
        self.config = config
        self.ranks = ranks
        self.stage = config.parallel.zero_stage
        self.accumulation = accumulation(config, world)
        self.frozen = zero_state.frozen_share(model, self.stage, ranks.rank, ranks.world_size)
        self._wrap(make_optimizer(model, config.optimizer, undecayed, lr_scales))
        self.fragments = zero_state.fragments(model, self.optimizer, self.stage, ranks.rank)
        self.inner = zero_state.inner_optimizer(self.optimizer, self.stage)
        if isinstance(self.inner, ScaledAdamW):
            self.inner.runs = scaled_runs(self.fragments, lr_scales)
        flats = zero_state.flats(self.optimizer, self.stage)
        fill_state(self.inner, flats)
        self.ema = None if config.train.ema_decay is None else Ema(flats, config.train.ema_decay)

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        raise NotImplementedError

    def step(self, micro_batches: Iterable[Inputs], lr: float) -> StepResult:
        """One optimizer step over `accumulation` micro-batches (pulled one at a time)."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        metric_sums: dict[str, torch.Tensor] = {}
        left = self.accumulation
        for inputs in micro_batches:  # not by enumerate: it keeps the inputs while the next ones are prepared
            left -= 1
            output = self._forward_backward(inputs, last=left == 0)
            loss_sum += output.loss.detach()
            for name, value in output.metrics.items():
                metric_sums[name] = metric_sums.get(name, 0.0) + value.detach().double()
            del inputs, output
        sums = _HostCopy(torch.stack([loss_sum, *metric_sums.values()]))
        norm, applied = self._update()  # the host waits for the norm there, and the sums are before it
        if self.ema and applied:
            self.ema.update()
        loss, *metrics = (value / self.accumulation for value in sums.read())
        return StepResult(loss, dict(zip(metric_sums, metrics, strict=True)), norm, applied)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def evaluate(
        self,
        batches: Iterable[T],
        forwards: int,
        measure: Measure[T],
        average: bool = True,
        forward: Callable[[Any, T], Any] | None = None,
    ) -> dict[str, float]:
        """Sums by name of `measure(output, batch)` (tensors of one element) over the batches of all ranks.

        A collective: every rank does exactly `forwards` forwards, since under ZeRO-3 all take part in each. A rank
        whose batches end before that repeats its last one, which is not counted again; each rank needs at least one.
        In evaluation mode, without gradients, with the weights' moving average where there is one and `average` asks
        for it; the steps that follow are the same bits as without it. forward: what is done with the plain module and
        a batch instead of the model's own forward, say a part of it. StopRequested, on all ranks, where the run is
        asked to stop meanwhile.
        """

        def run(batch: T) -> Any:
            return self.model(**batch.inputs) if forward is None else forward(self.module, batch)

        with self._for_evaluation(average):
            sums = sum_measures(batches, forwards, run, measure, self.ranks.check_stop)
        return self.ranks.sum(sums)

    @contextlib.contextmanager
    def _for_evaluation(self, average: bool) -> Iterator[None]:
        ema = self.ema if average else None
        self.model.eval()
        self._exchange(ema)
        try:
            with torch.no_grad():
                yield
        finally:
            self._exchange(ema)
            self.model.train()

    def _exchange(self, ema: Ema | None) -> None:
        if ema is not None:
            ema.exchange(self.fragments)
            zero_state.spread_weights(self.optimizer, self.stage)

    def warm_up(self, inputs: Inputs) -> None:
        """A forward and backward with dropped gradients, where the wrapper's first iteration differs from others."""

    def _forward_backward(self, inputs: Inputs, last: bool) -> Any:
        raise NotImplementedError

    def _update(self) -> tuple[torch.Tensor, bool]:
        """Apply the gradients: (their norm before clipping, on the device; whether they were applied)."""
        raise NotImplementedError

    @property
    def adam_step(self) -> int:
        """Optimizer steps that were applied."""
        return max((int(state["step"]) for state in self.inner.state.values()), default=0)

    def snapshot(self, reserve: Reserve = new_memory) -> list[Piece]:
        """This rank's pieces of a checkpoint: fp32 copies on the CPU that no later step changes.

        reserve: gives the memory for all of them, where arrays_in lays them out.
        """
        saved = list(self._saved())
        arrays = arrays_in(reserve, [(_numpy_dtype(each), each.numel()) for *_, each in saved])
        pieces = []
        for (kind, name, shape, start, values), array in zip(saved, arrays, strict=True):
            torch.from_numpy(array).copy_(values.detach().reshape(-1), non_blocking=True)
            pieces.append(Piece(kind, name, shape, start, array))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return pieces

    def _saved(self) -> Iterator[tuple[str, str, tuple[int, ...], int, torch.Tensor]]:
        """What this rank gives to a checkpoint: (kind, name, shape of the whole, start, values)."""
        for run in self._written():
            kinds = {"param": run.weights()} | {kind: run.moment(self.inner, kind) for kind in zero_state.MOMENTS}
            if self.ema:
                kinds["ema"] = self.ema.of(run)
            for kind, values in kinds.items():
                yield kind, run.name, run.shape, run.start, values
        for run in self.frozen:
            yield "frozen", run.name, run.shape, run.start, run.weights()
        if self.ranks.rank == 0:
            for name, buffer in saved_buffers(self.module).items():
                yield "buffer", name, tuple(buffer.shape), 0, buffer

    def _written(self) -> list[zero_state.Fragment]:
        """The fragments that this rank writes: all it owns, or at stage 0 its share of what all own."""
        if self.stage > 0:
            return self.fragments
        return zero_state.share(self.fragments, self.ranks.rank, self.ranks.world_size)

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What all ranks hold the same bits of, by name: weights and buffers, so far as they are whole on each rank;
        at stage 0 Adam's moments and the moving average too."""
        yield from self.module.named_buffers()
        for name, parameter in self.module.named_parameters():
            if parameter.numel():  # stage 3 leaves those empty that are sharded
                yield name, parameter
        if self.stage == 0:
            for fragment in self.fragments:
                for kind in zero_state.MOMENTS:
                    yield f"{kind} of {fragment.name}", fragment.moment(self.inner, kind)
                if self.ema:
                    yield f"ema of {fragment.name}", self.ema.of(fragment)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load master weights, Adam's state and the moving average from a checkpoint of any stage and world.

        Without an average in the checkpoint it starts from the weights. `load_weights` must have loaded the
        module before it was wrapped: at bf16 the low-precision copies are made from it. Raises CheckpointError
        for a tensor that is missing or damaged.
        """
        average = "ema" if checkpoint.shapes("ema") else "param"
        for fragment in self.fragments:
            targets = [("param", fragment.weights())]
            targets += [(kind, fragment.moment(self.inner, kind)) for kind in zero_state.MOMENTS]
            if self.ema:
                targets.append((average, self.ema.of(fragment)))
            for kind, target in targets:
                values = checkpoint.read(kind, fragment.name, fragment.start, fragment.count)
                target.copy_(torch.from_numpy(values))
        for state in self.inner.state.values():
            state["step"].fill_(checkpoint.state["adam_step"])


class _HostCopy:
    """A vector of the device on its way to the host: queued when made, and `read` waits for nothing behind it."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._there = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[float]:
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()


def load_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights and buffers into the plain module.

    Raises CheckpointError where names, shapes or what is frozen (`requires_grad`) differ.
    """
    parameters = dict(module.named_parameters())
    checkpoint.require({name: tuple(p.shape) for name, p in parameters.items()}, "param", "frozen")
    kinds = {name: "param" if p.requires_grad else "frozen" for name, p in parameters.items()}
    saved = checkpoint.shapes("frozen")
    frozen = [name for name, kind in kinds.items() if kind == "frozen" and name not in saved]
    trained = [name for name, kind in kinds.items() if kind == "param" and name in saved]
    if frozen or trained:
        raise CheckpointError(
            f"{checkpoint.folder}: other parameters are frozen than here: {len(trained)} there alone"
            f"{': ' if trained else ''}{listed(trained)}; {len(frozen)} here alone{': ' if frozen else ''}"
            f"{listed(frozen)}; freeze the same ones, or start another run.name with model.init_from"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(checkpoint.whole(kinds[name], name)))
        for name, buffer in saved_buffers(module).items():
            buffer.copy_(torch.from_numpy(checkpoint.whole("buffer", name)))


def saved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers; the others are fixed tables, which are recomputed."""
    persistent = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def _numpy_dtype(values: torch.Tensor) -> np.dtype[Any]:
    return torch.empty(0, dtype=values.dtype).numpy().dtype
