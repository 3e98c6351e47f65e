"""AdamW over two parameter groups, a learning rate's factor for each parameter, and its state made by hand.

Groups differ by weight decay alone, since ZeRO's cost grows with their number. What differs by parameter within
a group, as in layer-wise decay, is applied to runs of the tensors that the wrapper laid the parameters out in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from vitscale.config.schema import Optimizer
from vitscale.engine.zero_state import Fragment


def make_optimizer(
    model: nn.Module,
    config: Optimizer,
    undecayed: Container[str] = (),
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """Fused AdamW whose group "decayed" decays and whose group "undecayed" does not.

    Biases and norms (one dimension) never decay, nor do the parameters named in `undecayed`. With none
    named, class and mask tokens and learned positions decay, as in the MAE code (timm 0.3.2's
    add_weight_decay: whatever has more than one dimension; its sin-cos tables are no parameters, nor are
    ours). timm's ViT exempts them: fine-tuning by its rules names them. The learning rate is set before
    every step; where `lr_scales` (1 where a name is missing) has others than 1, `ScaledAdamW`, which
    must be given its runs.
    """
    lr_scales = lr_scales or {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unknown = lr_scales.keys() - dict(model.named_parameters()).keys()
    assert not unknown, f"lr_scales names no parameters of the model: {sorted(unknown)}"
    decays = {name: p.ndim > 1 and name not in undecayed for name, p in trained.items()}
    groups = [
        {"name": label, "params": [p for name, p in trained.items() if decays[name] == decayed], "weight_decay": decay}
        for label, decayed, decay in (("decayed", True, config.weight_decay), ("undecayed", False, 0.0))
    ]
    # An empty group crashes DeepSpeed.
    groups = [group for group in groups if group["params"]]
    optimizer = ScaledAdamW if any(lr_scales.get(name, 1.0) != 1.0 for name in trained) else torch.optim.AdamW
    return optimizer(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


@dataclass(frozen=True)
class Run:
    """Elements [start, start + count) of a flattened tensor, stepped by `scale` times the group's learning rate."""

    scale: float
    start: int
    count: int


def scaled_runs(fragments: Iterable[Fragment], lr_scales: Mapping[str, float]) -> dict[torch.Tensor, list[Run]]:
    """The runs of each tensor that holds a parameter whose scale is not 1; neighbours of one scale are one run."""
    runs: dict[torch.Tensor, list[Run]] = defaultdict(list)
    for fragment in sorted(fragments, key=lambda fragment: fragment.offset):
        scale, before = lr_scales.get(fragment.name, 1.0), runs[fragment.flat]
        if before and before[-1].scale == scale and before[-1].start + before[-1].count == fragment.offset:
            before[-1] = Run(scale, before[-1].start, before[-1].count + fragment.count)
        else:
            before.append(Run(scale, fragment.offset, fragment.count))
    return {flat: of_flat for flat, of_flat in runs.items() if any(run.scale != 1.0 for run in of_flat)}


class ScaledAdamW(torch.optim.AdamW):
    """AdamW that steps runs of its tensors by learning rates of their own: one call of torch's for each scale."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        self.runs: dict[torch.Tensor, list[Run]] = {}  # by tensor, since ZeRO swaps param_groups before each step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over the tensors that have a gradient; those without runs are stepped whole."""
        for group in self.param_groups:
            stepped = [tensor for tensor in group["params"] if tensor.grad is not None]
            beta1, beta2 = group["betas"]
            for scale, (weights, gradients, first, second, steps) in self._by_scale(stepped).items():
                adamw(weights, gradients, first, second, [], steps, foreach=group["foreach"], fused=group["fused"],
                      amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"] * scale,
                      weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)  # fmt: skip
            for tensor in stepped:
                self.state[tensor]["step"] += 1

    def _by_scale(self, tensors: Iterable[torch.Tensor]) -> dict[float, list[list[torch.Tensor]]]:
        """By scale what torch's adamw takes of its runs: weights, gradients, both moments, steps."""
        calls: dict[float, list[list[torch.Tensor]]] = defaultdict(lambda: [[], [], [], [], []])
        for tensor in tensors:
            assert tensor.grad is not None
            state = self.state[tensor]
            moments = (state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
            flats = (tensor.view(-1), tensor.grad.reshape(-1), *moments)
            runs = self.runs.get(tensor) or [Run(1.0, 0, tensor.numel())]
            # adamw counts up the step of each entry: these are copies, and `step` counts the tensor's own.
            steps = state["step"].repeat(len(runs))
            for run, step in zip(runs, steps, strict=True):
                views = [flat[run.start : run.start + run.count] for flat in flats]
                for entries, entry in zip(calls[run.scale], [*views, step], strict=True):
                    entries.append(entry)
        return calls


def fill_state(optimizer: torch.optim.Optimizer, flats: Iterable[torch.Tensor]) -> None:
    """Give every tensor that the optimizer steps its AdamW state at step 0.

    AdamW makes it lazily at its first step; made here, a checkpoint can be written and read at any
    time, in one way for a fresh run and a resumed one.
    """
    for flat in flats:
        optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),  # where the fused step reads it
            "exp_avg": torch.zeros_like(flat, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(flat, memory_format=torch.preserve_format),
        }
