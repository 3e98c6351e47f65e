"""Where a run's time goes: images a second and shares of the wall clock, between two looks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Meters:
    """Counts images and time from one `read` to the next, by a clock that never jumps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._images = self._steps = 0
        self._between_steps = 0.0
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Count the time inside as spent on `what` (save, tracking, evaluation, ...) between steps."""
        began = self._clock()
        try:
            yield
        finally:
            elapsed = self._clock() - began
            self._between_steps += elapsed
            self.add({what: elapsed})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count seconds of steps that were measured elsewhere, by what they were spent on."""
        for what, spent in seconds.items():
            self._seconds[what] += spent

    def count(self, images: int) -> None:
        """One step of so many images is done."""
        self._images += images
        self._steps += 1

    def read(self) -> dict[str, float]:
        """images_per_second, step_seconds (of steps alone) and WHAT_share of all the time since the last call."""
        now = self._clock()
        elapsed = max(now - self._began, 1e-9)
        row = {
            "images_per_second": self._images / elapsed,
            "step_seconds": (elapsed - self._between_steps) / max(self._steps, 1),
        }
        row |= {f"{what}_share": seconds / elapsed for what, seconds in sorted(self._seconds.items())}
        self._began, self._between_steps, self._images, self._steps = now, 0.0, 0, 0
        self._seconds = defaultdict(float, dict.fromkeys(self._seconds, 0.0))  # every row has the same columns
        return row
