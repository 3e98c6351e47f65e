"""What the machine of rank 0 is doing, under the names that MLflow's page of system metrics knows."""

from __future__ import annotations

from typing import Any

import psutil

try:
    import pynvml  # of nvidia-ml-py; without it a GPU's load is not recorded
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
            used = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            row[f"gpu_{number}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            row[f"gpu_{number}_memory_usage_megabytes"] = used.used / _MB
            row[f"gpu_{number}_memory_usage_percentage"] = 100 * used.used / used.total
            row[f"gpu_{number}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        return {f"system/{name}": float(value) for name, value in row.items()}


def _gpus() -> list[Any]:
    """Handles of the GPUs; none where there is no driver."""
    if pynvml is None:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
