"""The memory that a rank has to train in: how much there is, how much is in use, and how the lack of it is told."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from vitscale.world import World, control_groups

CONTEXT = 1_200_000_000  # bytes of CUDA, cuBLAS and NCCL beside torch's allocator
# What torch's allocator of the CPU, oneDNN and Python say where the system gives no more, a reader in its traceback:
# plain RuntimeErrors.
_NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|could not create a memory|Cannot allocate memory|can't start new thread"
    r"|std::bad_alloc|\bMemoryError\b"
)
# CUDA, NCCL and libraries such as cuBLAS take memory beside torch's allocator, whose error has a class of its own.
_NO_GPU_MEMORY = re.compile(r"\bout of memory\b|_ALLOC(ATION)?_FAILED\b")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Room:
    """Bytes that a rank can still take, and where the number comes from."""

    bytes: int
    source: str


def room(world: World, device: torch.device) -> Room:
    """Of this rank now: of its GPU, or of the machine's memory, which the ranks of a node share."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device) + CONTEXT  # which is counted among what a run needs
        others = max(0, total - free - own)
        beside = f" less {others / 1e9:.1f} GB that others use" if others else ""
        return Room(total - others, f"of the GPU's memory{beside}")
    shared = [(psutil.virtual_memory().available, "available on the machine"), *_of_groups()]
    ranks, own_limit = world.local_world_size, resource.getrlimit(resource.RLIMIT_AS)[0]
    told = f", over the {ranks} ranks of the node" if ranks > 1 else ""
    rooms = [Room(count // ranks, f"of the memory {source}{told}") for count, source in shared]
    if own_limit != resource.RLIM_INFINITY:
        rooms.append(Room(max(0, own_limit - _status("VmSize")), "that the limit of address space (ulimit -v) leaves"))
    return min(rooms, key=lambda each: each.bytes)


def _of_groups(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, str]]:
    """What the control groups of this process, a container's or a job's, leave of their limits of memory."""
    found = []
    for folder, newer in control_groups(own, mounted, "memory"):
        names, whole = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"  # whole: with the groups below
        if newer:
            names, whole = ("memory.max", "memory.current"), ""
        with contextlib.suppress(OSError, ValueError):  # not there, or without a limit ("max")
            limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
            rows = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            cached = int(rows[f"{whole}inactive_file"])  # which the kernel drops where memory is wanted
            found.append((max(0, limit - used + cached), f"that the limit of {folder} leaves"))
    return found


def peak_memory(device: torch.device) -> int:
    """The most bytes so far, or since `give_back`: of tensors on the GPU, or of this process's RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_in_use(device: torch.device) -> int:
    """Now, as peak_memory counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def give_back(device: torch.device) -> None:
    """Give the system what is not in use any more, and let peak_memory begin again with what is."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(AttributeError):  # only glibc keeps it, and has the function
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not every container lets a process do that
        _RESET.write_text("5", encoding="ascii")


@contextlib.contextmanager
def bounded(device: torch.device, most: int) -> Iterator[None]:
    """Within it, on a CPU, an allocation beyond so many further bytes fails, where the system would end the process for
    it; a GPU's fails by itself."""
    if device.type == "cuda":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([_status("VmSize") + most, *limits]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device, or the machine, had no memory left."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return is_out_of_gpu_memory(error) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Whether it was the device, by torch or by one of the libraries that take memory for themselves."""
    by_type = isinstance(error, torch.OutOfMemoryError)
    return by_type or (isinstance(error, RuntimeError) and bool(_NO_GPU_MEMORY.search(str(error))))


def lack(error: Exception) -> str:
    """The line of such an error that says so: NCCL's is the last."""
    lines = str(error).splitlines()
    told = next((line for line in lines if _NO_GPU_MEMORY.search(line) or _NO_MEMORY.search(line)), None)
    return " ".join((told or (lines or [""])[0]).split()) or type(error).__name__


def has_own_limit() -> bool:
    """Whether this process has a limit of address space (ulimit -v), which nobody else uses up."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _status(name: str) -> int:
    """Bytes, by a line of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[name].split()[0]) * 1024
