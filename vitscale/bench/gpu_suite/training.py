"""Training without a run around it: a model, its engine and inputs that are pure functions of their number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from vitscale import rng
from vitscale.bench.gpu_suite.cases import Mismatch
from vitscale.checkpoint.saving import save_checkpoint
from vitscale.checkpoint.store import open_checkpoint
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig
from vitscale.config.step import accumulation
from vitscale.engine.backend import Backend
from vitscale.engine.engine import load_weights
from vitscale.engine.optim import make_optimizer
from vitscale.models.auto import new_model
from vitscale.world import World

LR = 1e-3
Weights = Mapping[str, np.ndarray]  # flat, fp32, by parameter


def batch(config: RunConfig, number: int, device: torch.device) -> dict[str, Tensor]:
    """The model's keyword arguments for micro-batch `number`, the same on every device."""
    count, generator = config.train.micro_batch, torch.Generator().manual_seed(number)
    ids = torch.arange(number * count, (number + 1) * count)
    size = (count, config.model.num_channels, *pair(config.model.image_size))
    inputs = {"pixel_values": torch.randn(size, generator=generator), "sample_key": rng.sample_key(0, 0, ids)}
    if config.objective.needs_labels:
        inputs["labels"] = ids % config.model.num_labels
    return {name: value.to(device) for name, value in inputs.items()}


def gradients(
    config: RunConfig, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """The loss of one micro-batch and the gradient of every parameter, fp32 on the CPU."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, as in a run
    torch.set_float32_matmul_precision("highest")
    model = new_model(config, config.run.seed).to(device).train()
    if compiled:
        model.compile_blocks()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = model(**batch(config, 0, device)).loss
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), {name: gradient.float().cpu() for name, gradient in trained.items()}


def gradient_distances(computed: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, float, str]:
    """||computed - expected|| / ||expected||: of all gradients together, the largest of one parameter, its name.

    A gradient that is nearly 0 (a key's bias: softmax does not see it) is measured against a thousandth of all.
    """
    if computed.keys() != expected.keys():
        raise Mismatch(f"gradients of {sorted(computed.keys() ^ expected.keys())} are there on one side only")
    differences = {name: float((computed[name] - gradient).norm()) for name, gradient in expected.items()}
    total = math.hypot(*(float(gradient.norm()) for gradient in expected.values()))
    relative = {
        name: differences[name] / max(float(gradient.norm()), 1e-3 * total) for name, gradient in expected.items()
    }
    worst = max(relative, key=lambda name: (math.isnan(relative[name]), relative[name]))
    return math.hypot(*differences.values()) / total, relative[worst], worst


def reference(config: RunConfig, steps: int) -> tuple[list[float], Weights, Weights]:
    """The same training by plain torch in fp32 on the CPU: losses, weights at its start and at its end."""
    model, cpu = new_model(config, config.run.seed).train(), torch.device("cpu")
    start = _weights(model)
    optimizer = make_optimizer(model, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = LR
    count, losses = accumulation(config, World()), []
    for step in range(steps):
        total = 0.0
        for number in range(step * count, (step + 1) * count):
            loss = model(**batch(config, number, cpu)).loss / count
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, start, _weights(model)


def _weights(model: nn.Module) -> Weights:
    return {name: p.detach().flatten().clone().numpy() for name, p in model.named_parameters()}


def update_distance(computed: Weights, expected: Weights, start: Weights) -> float:
    """||computed - expected|| / ||expected - start|| over all parameters: how far training went another way."""
    difference = sum(float(np.square(computed[name] - values).sum()) for name, values in expected.items())
    moved = sum(float(np.square(values - start[name]).sum()) for name, values in expected.items())
    return (difference / moved) ** 0.5


class Training:
    """One engine on such inputs, from initial values or from a checkpoint; a context, one at a time in a process."""

    def __init__(self, config: RunConfig, world: World, checkpoint: Path | None = None) -> None:
        self.config = config
        self.backend = Backend(config, world)
        model = new_model(config, config.run.seed)
        opened = None if checkpoint is None else open_checkpoint(checkpoint, self.backend.ranks)
        if opened is not None:
            load_weights(model, opened)
        self.engine = self.backend.wrap(model, config)
        if opened is not None:
            self.engine.restore(opened)

    def steps(self, first: int, end: int) -> list[float]:
        """The losses of steps [first, end)."""
        losses, count = [], self.engine.accumulation
        for step in range(first, end):
            numbers = range(step * count, (step + 1) * count)
            result = self.engine.step((batch(self.config, number, self.backend.device) for number in numbers), LR)
            if not result.applied:
                raise Mismatch(f"step {step + 1} was skipped: its gradient norm was {float(result.grad_norm)}")
            losses.append(result.loss)
        return losses

    def weights(self) -> Weights:
        """The fp32 master weights (of one rank, which has them all)."""
        pieces = sorted((p for p in self.engine.snapshot() if p.kind == "param"), key=lambda piece: piece.start)
        names = {piece.name for piece in pieces}
        return {name: np.concatenate([p.values for p in pieces if p.name == name]) for name in names}

    def save(self, root: Path, step: int) -> Path:
        """A checkpoint after `step` steps."""
        state = {"adam_step": self.engine.adam_step}
        return save_checkpoint(root, step, self.engine.snapshot(), state, self.backend.ranks, keep=1)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.backend.close()
