"""That the mode which stands in for a GPU does refuse what a GPU would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.one_device import OneDevice

META = torch.device("meta")


def far(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=META)


MIXED: dict[str, Callable[[], Any]] = {
    "matmul": lambda: far(2, 2) @ torch.zeros(2, 2),
    "gather": lambda: far(2, 2).gather(0, torch.zeros(1, 2, dtype=torch.int64)),
    "index": lambda: far(2, 2)[torch.tensor([0, 1])],
    "write at an index": lambda: far(3).__setitem__(torch.tensor([0]), 1.0),
    "embedding": lambda: torch.nn.functional.embedding(torch.tensor([0]), far(3, 3)),
    "add": lambda: far(2) + torch.zeros(2),
    "cat": lambda: torch.cat([far(2), torch.zeros(2)]),
}
READ: dict[str, Callable[[], Any]] = {
    "item": lambda: far().item(),
    "truth": lambda: bool(far() > 0),
    "to a list": lambda: far(3).tolist(),
    "to the CPU": lambda: far(3).cpu(),
    "into a tensor of the CPU": lambda: torch.zeros(3).copy_(far(3)),
    "equal": lambda: torch.equal(far(3), far(3)),
    "picked by a mask": lambda: far(3)[far(3, dtype=torch.bool)],
    "written by a mask": lambda: far(3).__setitem__(far(3, dtype=torch.bool), 1.0),
    "where": lambda: torch.where(far(3) > 0),
    "unique": lambda: far(3).unique(),
    "repeated by a tensor": lambda: far(3).repeat_interleave(far(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", MIXED)
def test_refuses_tensors_on_two_devices(name: str) -> None:
    with OneDevice(), pytest.raises((AssertionError, RuntimeError), match=r"tensors on|not on the expected device"):
        MIXED[name]()


def test_is_needed_for_it() -> None:
    """Of these `meta` alone lets some pass; where it learns to refuse them all, the mode can go."""
    for name in ("matmul", "gather", "index", "write at an index", "embedding"):
        MIXED[name]()


@pytest.mark.parametrize("name", READ)
def test_refuses_what_the_host_would_wait_for(name: str) -> None:
    with OneDevice(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        READ[name]()


def test_refuses_a_mix_in_backward() -> None:
    class Mixes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient[torch.tensor([0, 1])]

    with OneDevice():
        y = Mixes.apply(far(2).requires_grad_()).sum()
        with pytest.raises(AssertionError, match="tensors on"):
            y.backward()


def test_lets_pass_what_a_gpu_does() -> None:
    with OneDevice() as mode:
        x = torch.zeros(3).to(META)
        x.copy_(torch.ones(3))
        x = (x + torch.tensor(2.0) * 3) @ far(3, 2)
        x[far(1, dtype=torch.int64)] = 1.0
        torch.zeros(3)[torch.tensor([True, False, True])].tolist()  # on the CPU all may be read
    assert mode.seen >= 6
