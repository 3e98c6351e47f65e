"""Several ranks in one process: threads that really wait for each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from vitscale.checkpoint.store import Ranks


class ThreadRanks:
    """One of several ranks that share a barrier and a row of slots."""

    def __init__(self, rank: int, slots: list[str], barrier: Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = json.dumps(value)  # what ranks tell each other must be JSON-able
        self._barrier.wait(timeout=30)
        values = [json.loads(text) for text in self._slots]
        self._barrier.wait(timeout=30)
        return values

    def collect(self, value: Any) -> list[Any]:
        values = self.gather(value)
        return values if self.rank == 0 else []


def run_ranks(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """`work` on every rank at once; results by rank, an exception in place of a result."""
    slots, barrier = [""] * world_size, Barrier(world_size)

    def one(rank: int) -> Any:
        try:
            return work(ThreadRanks(rank, slots, barrier))
        except Exception as error:  # handed to the test
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))
