"""The same work on many shards: in processes, threads inside, with a line every few seconds."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Protocol, TypeVar

from vitscale.errors import VitscaleError
from vitscale.files.store import FileStat, is_remote
from vitscale.text import to_stderr
from vitscale.world import World

Report = Callable[[str], None]
_THREADS = 16  # of a process: a file system far away answers many questions at once
_WORTH_A_PROCESS = 256 << 20  # bytes of shards
_REPORT_EVERY_S = 10.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Sized(Protocol):
    """A shard by its path and size."""

    @property
    def path(self) -> str: ...

    @property
    def stat(self) -> FileStat: ...


Item = TypeVar("Item", bound=Sized)
Result = TypeVar("Result")


def report(line: str) -> None:
    """To standard error, as the reader process has it too."""
    to_stderr(line)


def on_shards(
    work: Callable[[Item], Result],
    shards: Sequence[Item],
    what: str,
    say: Report = report,
    workers: int | None = None,
) -> list[Result]:
    """What `work`, which can be pickled, gives for each shard; `say` gets a line about `what` every few seconds.

    workers: processes; None: as many as this one owns cores, where there are bytes enough. The first error is raised.
    """
    if workers is None:
        size = sum(shard.stat.bytes for shard in shards)
        workers = min(World().cores_per_rank, size // _WORTH_A_PROCESS)
    workers = max(1, min(workers, len(shards)))
    part = max(1, min(_THREADS, len(shards) // (workers * 4)))
    parts = [shards[start : start + part] for start in range(0, len(shards), part)]
    # Threads do not survive a fork, and what they hold stays locked in it: obstore's, and in a rank our own.
    threads = threading.active_count() > 1 or any(is_remote(shard.path) for shard in shards)
    context = get_context("spawn" if threads else "fork")
    results: list[Result] = []
    started = reported = time.monotonic()
    pool: Executor = ProcessPoolExecutor(workers, context, leave_with_parent) if workers > 1 else ThreadPoolExecutor(1)
    try:
        with pool:
            for some in pool.map(partial(_in_threads, work), parts):
                results += some
                now = time.monotonic()
                if now - reported >= _REPORT_EVERY_S:
                    reported = now
                    left = (now - started) * (len(shards) / len(results) - 1)
                    say(f"{what}: {len(results):,} of {len(shards):,} shards, {left:.0f} s left")
    except BrokenProcessPool:
        raise VitscaleError(
            f"{what}: a process was killed, perhaps for memory, after {len(results):,} of {len(shards):,} shards; "
            "start the same command again, which goes on from there"
        ) from None
    return results


def _in_threads(work: Callable[[Item], Result], shards: Sequence[Item]) -> list[Result]:
    with ThreadPoolExecutor(min(_THREADS, len(shards))) as pool:
        return list(pool.map(work, shards))


def leave_with_parent() -> None:
    """In a worker: end at Ctrl-C without a traceback, at TERM though the parent it was forked of has its own use for
    that, and when the parent is gone, however that happened."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
