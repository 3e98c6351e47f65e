"""Where the time of a start goes, from the start of a rank's process to the end of its first step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import psutil

_WORTH_TELLING_S = 0.5  # by which a rank is slower than rank 0


class StartUp:
    """Seconds of each part of a start on this rank. A rank that is early waits for the others within `joining`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.note = ""  # for the end of its line
        self._last = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._ended = False

    def done(self, part: str) -> None:
        """What was done since the last call was this part."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def end(self, part: str) -> None:
        """The same for the last part; later calls count nothing."""
        if not self._ended:
            self._ended = True
            self.done(part)


def slowest(of_ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each part's seconds on the rank where it took longest. of_ranks: `StartUp.seconds`, by rank."""
    return {part: round(max(seconds.get(part, 0.0) for seconds in of_ranks), 3) for part in of_ranks[0]}


def as_line(of_ranks: Sequence[Mapping[str, float]], note: str = "") -> str:
    """Rank 0's parts, and the slowest rank where another is slower; a note after them."""
    parts = []
    for part, seconds in of_ranks[0].items():
        rank = max(range(len(of_ranks)), key=lambda rank: of_ranks[rank].get(part, 0.0))
        longest = of_ranks[rank].get(part, 0.0)
        other = f" (rank {rank}: {longest:.1f})" if longest > seconds + _WORTH_TELLING_S else ""
        parts.append(f"{part} {seconds:.1f}{other}")
    return f"start-up: {sum(of_ranks[0].values()):.1f} s to the end of the first step: {', '.join(parts)}{note}"
