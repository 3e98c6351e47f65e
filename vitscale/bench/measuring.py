"""What the benchmarks share: the device, the clock, and the peers' libraries."""

from __future__ import annotations

import ctypes
import importlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from vitscale.errors import ConfigError

Turn = TypeVar("Turn")

# Dense bf16 FLOP/s of a large matrix product, measured; of others, and of CPUs, it is measured in the run.
MEASURED_PEAKS = {"H200": 790e12}


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
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
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


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a product of two random square matrices (zeros would run faster)."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: left @ right, device)


def median_seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a short step takes: the median of five measurements, after one to warm up."""
    step()
    steps = 10 if device.type == "cuda" else 1
    return statistics.median(seconds(step, steps, device) for _ in range(5))


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that the device can do in matrix products, and how that is known."""
    name = device_name(device)
    for known, peak in MEASURED_PEAKS.items():
        if known in name and dtype == torch.bfloat16:
            return peak, f"a {known}'s dense bf16, measured"
    side = 8192 if device.type == "cuda" else 2048
    return matrix_rate(device, dtype, side), f"a {side} x {side} matrix product in this run"


def reset_peak_memory() -> int:
    """Bytes of RAM that this process holds now; `memory_status("VmHWM")` is its peak from here on."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not counted
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    return memory_status("VmRSS")


def memory_status(key: str) -> int:
    """Bytes that /proc/self/status gives for a key, VmRSS or VmHWM."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"no {key} in /proc/self/status"
    return int(found[1]) * 1024
