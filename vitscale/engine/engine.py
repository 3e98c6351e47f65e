"""A model under training, whatever wraps it: steps, evaluation, its state as pieces and back.

ddp.py and zero.py say how gradients come about and are applied; zero_state.py where the state lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vitscale.checkpoint.fragments import Piece
from vitscale.checkpoint.store import Checkpoint
from vitscale.config.check import accumulation
from vitscale.config.schema import RunConfig
from vitscale.engine import zero_state
from vitscale.engine.optim import fill_state, make_optimizer
from vitscale.engine.ranks import ProcessRanks
from vitscale.world import World

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, on this rank."""

    loss: float  # mean over this rank's samples
    metrics: dict[str, float]
    grad_norm: float  # of the global gradient before clipping; inf or nan where it was not finite
    applied: bool  # False: the gradient was not finite and the weights are as before


class Engine:
    """A model under training: takes steps, gives its state as pieces and takes it back."""

    stage: int
    model: nn.Module  # as wrapped
    optimizer: Any  # torch's at stage 0, DeepSpeed's ZeRO optimizer above

    def __init__(
        self, accelerator: Any, model: nn.Module, config: RunConfig, world: World, ranks: ProcessRanks
    ) -> None:
        self.accelerator = accelerator
        self.module = model
        self.config = config
        self.ranks = ranks
        self.stage = config.parallel.zero_stage
        self.accumulation = accumulation(config, world)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert not frozen, f"frozen parameters are not checkpointed yet: {frozen}"
        # The fused step reads its state on the GPU.
        self.fused = accelerator.device.type == "cuda" and not config.parallel.offload_optimizer
        optimizer = make_optimizer(model, config.optimizer, self.fused)
        self._wrap(optimizer)
        self.fragments = zero_state.fragments(model, self.optimizer, self.stage, ranks.rank)
        self.inner = zero_state.inner_optimizer(self.optimizer, self.stage)
        fill_state(self.inner, zero_state.flats(self.optimizer, self.stage), self.fused)

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        raise NotImplementedError

    def step(self, micro_batches: Iterable[Inputs], lr: float) -> StepResult:
        """One optimizer step over `accumulation` micro-batches (pulled one at a time)."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        metric_sums: dict[str, torch.Tensor] = {}
        for number, inputs in enumerate(micro_batches):
            output = self._forward_backward(inputs, last=number == self.accumulation - 1)
            loss_sum += output.loss.detach()
            for name, value in output.metrics.items():
                metric_sums[name] = metric_sums.get(name, 0.0) + value.detach().double()
        norm, applied = self._update()
        metrics = {name: float(value) / self.accumulation for name, value in metric_sums.items()}
        return StepResult(float(loss_sum) / self.accumulation, metrics, norm, applied)

    def warm_up(self, inputs: Inputs) -> None:
        """What the wrapper does differently in its first iteration, done and dropped."""

    def _forward_backward(self, inputs: Inputs, last: bool) -> Any:
        raise NotImplementedError

    def _update(self) -> tuple[float, bool]:
        """Apply the gradients: (their norm before clipping, whether they were applied)."""
        raise NotImplementedError

    @property
    def adam_step(self) -> int:
        """Optimizer steps that were applied."""
        return max((int(state["step"]) for state in self.inner.state.values()), default=0)

    def snapshot(self) -> list[Piece]:
        """What this rank writes of a checkpoint: copies on the CPU that no later step changes."""
        pieces = []
        for fragment in self._written():
            pieces.append(_piece("param", fragment, fragment.weights()))
            for kind in zero_state.MOMENTS:
                pieces.append(_piece(kind, fragment, fragment.moment(self.inner, kind)))
        if self.ranks.rank == 0:
            for name, buffer in saved_buffers(self.module).items():
                pieces.append(Piece("buffer", name, tuple(buffer.shape), 0, _copied(buffer.reshape(-1))))
        return pieces

    def _written(self) -> list[zero_state.Fragment]:
        """The fragments that this rank writes: all it owns, or at stage 0 its share of what all own."""
        if self.stage > 0:
            return self.fragments
        return zero_state.share(self.fragments, self.ranks.rank, self.ranks.world_size)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take master weights and Adam's state from a checkpoint of any stage and world.

        `load_weights` must have put the weights into the module before it was wrapped: at bf16 the
        low-precision copies are made from them.
        """
        for fragment in self.fragments:
            targets = {"param": fragment.weights()}
            targets |= {kind: fragment.moment(self.inner, kind) for kind in zero_state.MOMENTS}
            for kind, target in targets.items():
                values = checkpoint.read(kind, fragment.name, fragment.start, fragment.count)
                target.copy_(torch.from_numpy(values))
        for state in self.inner.state.values():
            state["step"].fill_(checkpoint.state["adam_step"])


def load_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights and buffers into the plain module; names and shapes must agree."""
    parameters = dict(module.named_parameters())
    checkpoint.require("param", {name: tuple(p.shape) for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(checkpoint.whole("param", name)))
        for name, buffer in saved_buffers(module).items():
            buffer.copy_(torch.from_numpy(checkpoint.whole("buffer", name)))


def saved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state (fixed tables are recomputed instead)."""
    kept = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _piece(kind: str, fragment: zero_state.Fragment, values: torch.Tensor) -> Piece:
    return Piece(kind, fragment.name, fragment.shape, fragment.start, _copied(values.float()))


def _copied(values: torch.Tensor) -> np.ndarray:
    return values.detach().to("cpu", copy=True).numpy()  # .cpu() of what is there already would be a view
