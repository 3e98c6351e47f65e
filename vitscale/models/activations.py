"""Activations by transformers' names (its activations.py): all that have no parameters of their own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Elementwise(nn.Module):
    """A function of each number."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _gelu_tanh() -> nn.Module:
    return nn.GELU(approximate="tanh")


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clip(-10, 10)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _sqrtsoftplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_10": lambda: Elementwise(_gelu_10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": nn.GELU,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": nn.Hardswish,
    "laplace": lambda: Elementwise(_laplace),
    "leaky_relu": nn.LeakyReLU,
    "linear": nn.Identity,
    "mish": nn.Mish,
    "quick_gelu": lambda: Elementwise(_quick_gelu),
    "relu": nn.ReLU,
    "relu2": lambda: Elementwise(_relu2),
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "sqrtsoftplus": lambda: Elementwise(_sqrtsoftplus),
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}
