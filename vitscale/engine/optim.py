"""AdamW over two parameter groups, and its state made by hand before the first step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from vitscale.config.schema import Optimizer


def make_optimizer(model: nn.Module, config: Optimizer, fused: bool) -> torch.optim.AdamW:
    """AdamW whose first group decays (matrices, convolutions, tokens) and whose second does not
    (biases and norms, as MAE and timm have it). The learning rate is set before every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # An empty group crashes DeepSpeed.
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def fill_state(optimizer: torch.optim.Optimizer, flats: Iterable[torch.Tensor], fused: bool) -> None:
    """Give every tensor that the optimizer steps its AdamW state at step 0.

    AdamW makes it lazily at its first step; made here, a checkpoint can be written and read at any
    time, in one way for a fresh run and a resumed one.
    """
    for flat in flats:
        optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(flat, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(flat, memory_format=torch.preserve_format),
        }
