"""What the benchmarks share: the device, the clock, and the peers' libraries."""

from __future__ import annotations

import importlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from vitscale.errors import ConfigError

Turn = TypeVar("Turn")


def device_of(asked: str | None) -> torch.device:
    """The device asked for (--device), or the GPU where there is one."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda: torch sees no GPU here; leave the option away to measure the CPU")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def device_name(device: torch.device) -> str:
    """The GPU, or how many threads of which CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{torch.get_num_threads()} threads of {found[1] if found else 'a CPU'}"


def seconds(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Seconds a step takes, over `steps` of them."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / steps


def in_turn(contenders: Sequence[Turn], round_number: int) -> Sequence[Turn]:
    """The contenders in the order of this round: there and back, so that no one always follows another."""
    return contenders if round_number % 2 == 0 else contenders[::-1]


def transformers() -> ModuleType:
    """transformers, also where torchvision is installed but cannot be loaded."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # transformers then does without
    return importlib.import_module("transformers")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
