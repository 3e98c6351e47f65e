"""How much memory a rank has, and where the number comes from."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from vitscale.engine import room as rooms
from vitscale.engine.room import (
    give_back,
    is_out_of_gpu_memory,
    is_out_of_memory,
    lack,
    memory_in_use,
    peak_memory,
    room,
)
from vitscale.world import World

CPU = torch.device("cpu")


NEWER = ("memory.max", "memory.current", "inactive_file")
OLDER = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("groups", "names"), [("0::/job/step", NEWER), ("4:cpu,cpuacct:/x\n5:memory:/job/step", OLDER)]
)
def test_the_limits_of_control_groups(tmp_path: Path, groups: str, names: tuple[str, ...]) -> None:
    """Of a job above a step: what is left of each, with what the kernel would drop."""
    own, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    own.write_text(groups + "\n")
    job = mounted / ("memory" if "memory:" in groups else "") / "job"
    step = job / "step"
    step.mkdir(parents=True)
    assert rooms._of_groups(own, mounted) == []
    for folder, limit in ((job, "1000"), (step, "max")):
        for name, value in zip(names[:2], (limit, "700"), strict=True):
            (folder / name).write_text(value + "\n")
        (folder / "memory.stat").write_text(f"anon 600\n{names[2]} 50\n")
    assert rooms._of_groups(own, mounted) == [(350, f"that the limit of {job} leaves")]
    (step / names[0]).write_text("600\n")
    assert [left for left, _ in rooms._of_groups(own, mounted)] == [0, 350]


def test_the_ranks_of_a_node_share_its_memory() -> None:
    alone, shared = room(World(), CPU), room(World(world_size=8, local_world_size=4), CPU)
    assert 0 < alone.bytes <= psutil.virtual_memory().total
    assert shared.bytes == pytest.approx(alone.bytes / 4, rel=0.2)
    assert shared.source.endswith(", over the 4 ranks of the node")


def test_a_limit_of_address_space_is_a_rank_s_own_and_is_told_from_a_bug() -> None:
    program = """
import resource, torch
from vitscale.engine.room import is_out_of_memory, room
from vitscale.world import World
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 100_000_000, resource.RLIM_INFINITY))
found = room(World(world_size=8, local_world_size=8), torch.device("cpu"))
assert 50_000_000 < found.bytes <= 100_000_000 and "ulimit -v" in found.source, found
try:
    torch.ones(10**9)
except RuntimeError as error:
    assert is_out_of_memory(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
    assert not is_out_of_memory(RuntimeError("The size of tensor a (3) must match"))
    assert is_out_of_memory(MemoryError())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "CUBLAS"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "CUDNN"),
        (RuntimeError("CUDA driver error: out of memory"), "driver error"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "Triton"),
        (torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), "CUDA error"),
        (dist.DistBackendError(
            "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, unhandled cuda error (run "
            "with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\nncclUnhandledCudaError: Call to CUDA function "
            "failed.\nLast error:\nCuda failure 2 'out of memory'"), "Cuda failure 2 'out of memory'"),
    ],
)  # fmt: skip
def test_libraries_that_ran_out_of_a_gpu_s_memory(error: Exception, line: str) -> None:
    """As torch, NCCL and Triton put it; the line that says so is not always the first."""
    assert is_out_of_memory(error)
    assert is_out_of_gpu_memory(error)
    assert line in lack(error)
    assert "\n" not in lack(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("std::bad_alloc"),
        RuntimeError("the reader failed at batch 3:\nTraceback (most recent call last):\n  ...\nMemoryError"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_the_machine_s_memory_is_another(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_gpu_memory(error)
    assert lack(error) in ("std::bad_alloc", "MemoryError", "[Errno 12] Cannot allocate memory")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        dist.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 999 'unknown error'"),
    ],
)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_a_peak_is_forgotten_and_memory_given_back() -> None:
    give_back(CPU)
    before = memory_in_use(CPU)
    tensors = [torch.ones(250_000) for _ in range(200)]  # small enough for glibc to keep them
    assert memory_in_use(CPU) - before > 150_000_000
    del tensors
    assert peak_memory(CPU) - before > 150_000_000
    give_back(CPU)
    assert memory_in_use(CPU) - before < 50_000_000
    assert peak_memory(CPU) - before < 50_000_000
