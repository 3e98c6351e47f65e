"""Models in which no number is a usual one, and outputs that must be equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def shaken(model: nn.Module) -> Any:
    """Random values in every parameter that learns, so that no bias, token or position is 0 and no norm 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5), (ours - theirs).abs().max()
