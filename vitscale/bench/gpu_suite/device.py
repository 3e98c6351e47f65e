"""Stage a: what machine this is, and the rates that the other stages' figures are to be seen against."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import partial

import psutil
import torch

from vitscale.bench.gpu_suite.cases import Cases, Figures, Setting, Unable
from vitscale.bench.measuring import device_name, matrix_rate, median_seconds

_PACKAGES = ("torch", "triton", "deepspeed", "accelerate", "transformers", "timm", "numpy", "webdataset", "simplejpeg",
             "mlflow", "pytest")  # fmt: skip
_DECODERS = {"nvImageCodec": "nvidia.nvimgcodec", "simplejpeg": "simplejpeg"}


def cases(setting: Setting) -> Cases:
    device = torch.device(setting.device)
    return {
        "machine": partial(_machine, device),
        "matrix": partial(_matrix, device, 512 if setting.tiny else 8192),
        "copy": partial(_copy, device, 1 << 22 if setting.tiny else 1 << 32),
        "upload": partial(_upload, device, 1 << 30),
    }


def _machine(device: torch.device) -> Figures:
    """Versions, cores and memory, and which decoders can be imported."""
    versions = {name: _version(name) for name in _PACKAGES}
    decoders = {name: _importable(module) for name, module in _DECODERS.items()}
    figures = {
        "device": device_name(device),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "versions": versions,
        "decoders": decoders,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "scratch_free_gib": shutil.disk_usage("/tmp").free / 2**30,
        **(_gpu(device) if device.type == "cuda" else {}),
    }
    able = [name for name, problem in decoders.items() if problem is None]
    figures["text"] = (
        f"{figures['device']}, driver {figures.get('driver', 'none')}, torch {torch.__version__}, deepspeed "
        f"{versions['deepspeed']}, {figures['cores']} cores, decoders {', '.join(able) or 'Pillow'}"
    )
    return figures


def _gpu(device: torch.device) -> Figures:
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu",
             "--format=csv,noheader"]  # fmt: skip
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        driver, *clocks = output.strip().split(", ")
    except (OSError, subprocess.SubprocessError) as error:
        driver, clocks = f"nvidia-smi: {error}", []
    return {
        "driver": driver,
        "clocks_and_power": clocks,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "gpu_memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> str | None:
    """Why it cannot be imported; None where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a library that does not load has its own ways to say so
        return f"{type(error).__name__}: {error}"
    return None


def _matrix(device: torch.device, side: int) -> Figures:
    rate = matrix_rate(device, torch.bfloat16, side) / 1e12
    return {"tflops": rate, "side": side, "text": f"{rate:.1f} TFLOP/s, bf16, {side}^3"}


def _copy(device: torch.device, count: int) -> Figures:
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * count / median_seconds(lambda: target.copy_(source), device) / 1e9
    return {"gb_per_second": rate, "bytes": count, "text": f"{rate:.0f} GB/s on the device, reads and writes counted"}


def _upload(device: torch.device, count: int) -> Figures:
    if device.type == "cpu":
        raise Unable("a CPU has no memory of its own to copy to")
    pinned = torch.randint(256, (count,), dtype=torch.uint8).pin_memory()
    target = torch.empty(count, dtype=torch.uint8, device=device)
    rate = count / median_seconds(lambda: target.copy_(pinned, non_blocking=True), device) / 1e9
    return {"gb_per_second": rate, "bytes": count, "text": f"{rate:.1f} GB/s from pinned memory to the device"}
