"""What a benchmark measures with: the device, the clock, and the process's memory."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from vitscale.errors import ConfigError

CPU = torch.device("cpu")


def device_of(name: str | None) -> torch.device:
    """The device of --device; without a name the GPU, or the CPU where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda: torch sees no GPU here; leave the option away to measure the CPU")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def device_name(device: torch.device) -> str:
    """The GPU, or how many threads of which CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {cpu_name()}"


def cpu_name() -> str:
    """The CPU's model."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return model[1] if model else "a CPU"


def synchronize(device: torch.device) -> None:
    """Wait for all work that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], Any], steps: int = 1, device: torch.device = CPU) -> float:
    """Seconds that a step takes, over `steps` of them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / steps


def median_seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a short step takes: the median of five measurements, after one to warm up."""
    step()
    steps = 10 if device.type == "cuda" else 1
    return statistics.median(seconds(step, steps, device) for _ in range(5))


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a product of two random square matrices (zeros would run faster)."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: left @ right, device)


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that the device reaches in a large matrix product, and how that is known."""
    side = 8192 if device.type == "cuda" else 2048
    return matrix_rate(device, dtype, side), f"a {side} x {side} matrix product in this run"


def start_memory(device: torch.device = CPU) -> int:
    """Bytes in use now: a GPU's by torch, or this process's RAM; `peak_memory` is the peak from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not counted
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    return _process_memory("VmRSS")


def peak_memory(device: torch.device = CPU) -> int:
    """Bytes that were in use at most since `start_memory`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_memory("VmHWM")


def reserved_memory(device: torch.device) -> int:
    """Bytes that torch held of a GPU at most since `start_memory`, in use or not; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


class Parts:
    """Which share of a step each of its parts takes: a GPU's between events, for which the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What runs within is part `name`, in a trace too."""
        with record_function(name):
            began = self._now()
            yield
            self._spans.setdefault(name, []).append((began, self._now()))

    def shares(self) -> dict[str, float]:
        """By name, of all that ran since the last call; together 1."""
        synchronize(self._device)
        spans, self._spans = self._spans, {}
        took = {name: sum(self._between(*span) for span in own) for name, own in spans.items()}
        return {name: own / sum(took.values()) for name, own in took.items()}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) if self._device.type == "cuda" else ended - began


def _process_memory(key: str) -> int:
    line = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert line is not None, f"no {key} in /proc/self/status"
    return int(line[1]) * 1024
