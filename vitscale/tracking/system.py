"""What the machine of rank 0 is doing, under the names that MLflow's page of system metrics knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

import psutil

try:
    pynvml: Any = import_module("pynvml")  # of nvidia-ml-py; without it a GPU's load is not recorded
except ImportError:
    pynvml = None

_MB = 1e6


class SystemSampler:
    """Samples of CPU, memory, network and every NVIDIA GPU of this machine."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()
        self._gpus = _gpus()
        psutil.cpu_percent()  # the first call only sets the mark that later ones count from

    def sample(self) -> dict[str, float]:
        """{metric name: value} now; CPU and network since the last sample."""
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        row = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": self._process.memory_info().rss / _MB,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / _MB,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / _MB,
        }
        self._network = network
        for number, gpu in enumerate(self._gpus):
            row |= {f"gpu_{number}_{name}": value for name, value in _gpu_readings(gpu)}
        return {f"system/{name}": float(value) for name, value in row.items()}


def _gpu_readings(gpu: Any) -> Iterator[tuple[str, float]]:
    readings: dict[str, Callable[[], float]] = {
        "utilization_percentage": lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_usage_megabytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / _MB,
        "power_usage_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    }
    for name, read in readings.items():
        with suppress(pynvml.NVMLError):  # not every GPU, nor a part of one, has every reading
            yield name, read()


def _gpus() -> list[Any]:
    """Handles of the GPUs; none where there is no driver."""
    if pynvml is None:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
