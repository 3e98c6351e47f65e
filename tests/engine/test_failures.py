"""Whose fault an exception is, and what the ranks of a run say of it: real gloo, whose errors have no class."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integration.worlds import Launcher
from vitscale.config.schema import Parallel, Run, RunConfig
from vitscale.engine.failures import classified
from vitscale.engine.guard import Diverged
from vitscale.engine.ranks import joined
from vitscale.errors import StorageError
from vitscale.run.job import Job
from vitscale.run.pretrain import run_locked
from vitscale.run_folder import BAD_INPUT, FAILED, STOPPED, exit_code
from vitscale.world import read_world


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "/runs/r/metrics.jsonl"), STOPPED, "/runs/r/metrics.jsonl"),
        (OSError(errno.ESTALE, "Stale file handle"), STOPPED, "Stale file handle"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), STOPPED, "make room there"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), STOPPED, "quota"),
        (OSError(errno.ENOSPC, "No space left on device"), STOPPED, "temporary files"),
        (OSError(errno.ESHUTDOWN, "Cannot send after transport endpoint shutdown"), STOPPED, "endpoint"),
        (OSError(errno.EROFS, "Read-only file system", "/runs/x"), STOPPED, "/runs/x"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs/x"), STOPPED, "could be written before"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), STOPPED, "no memory left"),
        (RuntimeError("can't start new thread"), STOPPED, "no memory left"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), FAILED, "Broken pipe"),
        (FileNotFoundError(errno.ENOENT, "No such file"), FAILED, "No such file"),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1.\nmore"), STOPPED, "NCCL communicator"),
        (RuntimeError("Application timeout caused pair closure"), STOPPED, "parallel.timeout_s"),
        (RuntimeError("The size of tensor a (3) must match"), FAILED, "size of tensor"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), BAD_INPUT, "gradient_checkpointing"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), STOPPED, "has no memory left"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), BAD_INPUT, "gradient_checkpointing"),
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), BAD_INPUT, "does not fit into the GPU's memory"),
        (dist.DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"), BAD_INPUT, "failure 2"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), STOPPED, "has no memory left"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), STOPPED, "the GPU has failed"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), FAILED, "device-side"),
        (Diverged("step 3: the gradient was not finite", 1, 2), BAD_INPUT, "step 3"),
        (StorageError("a.tar: its storage failed"), STOPPED, "a.tar"),
        (ZeroDivisionError("by 0"), FAILED, "by 0"),
    ],
)
def test_whose_fault_it_is(error: Exception, code: int, words: str) -> None:
    found = classified(error, RunConfig())
    assert exit_code(found) == code
    assert words in str(found)
    assert "\n" not in str(found)


# ---- on two ranks


class Breaking(Job):
    """Ranks that exchange until rank 1 breaks."""

    how = ""

    def run(self) -> int:
        with joined(self.world, self.config.parallel.timeout_s) as ranks:
            ranks.barrier()
            if self.world.rank == 1:
                break_as(self.how)
            ranks.gather("still here")
        raise AssertionError("the other rank is gone")


def break_as(how: str) -> None:
    if how == "hang":
        time.sleep(3)  # longer than parallel.timeout_s
        raise SystemExit
    raise {"bug": ZeroDivisionError("by 0"), "diverged": Diverged("step 3", 1, 2)}[how]


def break_one(folder: str, how: str) -> list[Any]:
    """[exit code of this rank, what exit.json says of all]; null for one that hung."""
    job = Breaking(RunConfig(run=Run(dir=folder), parallel=Parallel(timeout_s=1)), read_world())
    job.how = how
    code: int | None = None
    try:
        code = run_locked(job)
    except SystemExit:
        assert how == "hang"
    except Exception as error:
        code = exit_code(error)
    return [code, job.folder.read_exit()]


@pytest.mark.parametrize(
    ("how", "codes", "words"),
    [
        ("bug", [FAILED, FAILED], "ZeroDivisionError: by 0"),
        ("diverged", [BAD_INPUT, BAD_INPUT], "step 3"),
        ("hang", [STOPPED, None], "has not answered for parallel.timeout_s"),
    ],
)
def test_the_first_rank_to_fail_says_why(
    launcher: Launcher, tmp_path: Path, how: str, codes: list[int | None], words: str
) -> None:
    """The other one sees that it is gone, and ends with the same code."""
    ended = launcher.call(break_one, ranks=2, folder=str(tmp_path), how=how)
    assert [code for code, _ in ended] == codes
    record = ended[0][1]
    assert record["code"] == codes[0]
    assert words in record["reason"]
