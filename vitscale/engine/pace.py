"""Which rank is slow: all of them take the time of the slowest one's part of a step."""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vitscale.engine.ranks import ProcessRanks

_SLOW = 1.3  # times the median of the ranks is slow
_ROWS = 3  # in a row: a node that is busy for a moment is not worth a line
_LEAST_S = 0.005  # below that the clock and the system decide


class Pace:
    """Times this rank's forwards in training, which wait for no other rank below ZeRO-3; it makes nobody wait.

    By stage 3 a forward waits for the others' weights, so that a slow rank shows less.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._mark = _event if device.type == "cuda" else time.perf_counter
        self._began: Any = None
        self._spans: deque[tuple[Any, Any]] = deque()
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def read(self) -> float:
        """The median of the forwards' seconds since the last call; those that a GPU has not done come later."""
        seconds = []
        while self._spans and _passed(self._spans[0][1]):
            seconds.append(_seconds(*self._spans.popleft()))
        return statistics.median(seconds) if seconds else 0.0

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._began = self._mark() if module.training else None

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._began is not None:
            self._spans.append((self._began, self._mark()))
            self._began = None


class SlowRanks:
    """Compares the ranks' paces, row by row of metrics.jsonl."""

    def __init__(self, pace: Pace, ranks: ProcessRanks, say: Callable[[str], None]) -> None:
        """say: a line on the terminal; only rank 0's counts."""
        self._pace, self._ranks, self._say = pace, ranks, say
        self._slow: tuple[int, int] = (0, 0)  # rank, for how many rows

    def columns(self, data_share: float) -> dict[str, float]:
        """What a row says of all ranks, and once in the terminal who is slow. A collective.

        data_share: this rank's, of the time since the row before.
        """
        of_ranks = self._ranks.gather((self._pace.read(), data_share, socket.gethostname()))
        seconds = [of_rank[0] for of_rank in of_ranks]
        shares = [of_rank[1] for of_rank in of_ranks]
        slowest, usual = max(range(len(seconds)), key=seconds.__getitem__), statistics.median_low(seconds)
        self._tell(slowest, [of_rank[2] for of_rank in of_ranks], seconds[slowest], usual)
        return {
            "data_share": max(shares),
            "forward_seconds": usual,
            "slowest_forward_seconds": seconds[slowest],
            "slowest_rank": slowest,
        }

    def _tell(self, rank: int, hosts: Sequence[str], seconds: float, usual: float) -> None:
        if seconds < max(_SLOW * usual, _LEAST_S):
            self._slow = (rank, 0)
            return
        self._slow = (rank, self._slow[1] + 1 if self._slow[0] == rank else 1)
        if self._slow[1] == _ROWS:
            self._say(
                f"warning: rank {rank} on {hosts[rank]} is slow: {seconds * 1e3:.0f} ms for a forward, the ranks' "
                f"median is {usual * 1e3:.0f} ms, and all wait for it; look at that node's load, clocks and temperature"
            )


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _passed(mark: Any) -> bool:
    return isinstance(mark, float) or mark.query()


def _seconds(first: Any, last: Any) -> float:
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1000
