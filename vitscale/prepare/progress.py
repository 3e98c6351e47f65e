"""Work on many things in threads, its results in their order, and a line on stderr that tells how far it is."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

from vitscale.text import TerminalLine, duration

THREADS = 16  # a file system far away answers many questions at once
_PART = 256  # things that a thread looks at in one go: near ones would only make threads wait for each other
_REWRITTEN_EVERY_S, _SAID_EVERY_S = 0.2, 10.0  # on a terminal; elsewhere, a line
Item = TypeVar("Item")
Result = TypeVar("Result")


class Progress(TerminalLine):
    """How many are done: on a terminal as long as it lasts, else a line every few seconds. For many threads at once."""

    def __init__(self, what: str, unit: str, total: int | None = None) -> None:
        """total: None where nobody knows."""
        super().__init__()
        self._what, self._unit, self._total = what, unit, total
        self._done, self._changes = 0, Lock()
        self._began = self._said = time.monotonic()

    def add(self, count: int = 1) -> None:
        with self._changes:
            self._done += count
            now = time.monotonic()
            if now - self._said >= (_REWRITTEN_EVERY_S if self._in_place else _SAID_EVERY_S):
                self._said = now
                (self.rewrite if self._in_place else self.say)(self._text(now))

    def _text(self, now: float) -> str:
        if self._total is None:
            return f"{self._what}: {self._done:,} {self._unit}"
        left = (now - self._began) * (self._total / max(1, self._done) - 1)
        return f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {duration(left)} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """What comes of it is said by others: the line goes."""
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = False


def in_order(
    work: Callable[[Sequence[Item]], Result], items: Sequence[Item], part: int, threads: int = THREADS
) -> Iterator[Result]:
    """work(some) for each `part` of the items, in threads, in their order; few results wait."""
    parts = (items[start : start + part] for start in range(0, len(items), part))
    with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(work, some) for some in itertools.islice(parts, 4 * threads))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(work, some) for some in itertools.islice(parts, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def looked_at(work: Callable[[Item], Result], items: Sequence[Item], what: str, unit: str) -> list[Result]:
    """What `work` gives for each item, in threads; stderr is told of so many `unit` of `what`. The first error ends
    it."""
    part = max(1, min(_PART, len(items) // (4 * THREADS)))
    found: list[Result] = []
    with Progress(what, unit, len(items)) as progress:
        for some in in_order(lambda some: [work(item) for item in some], items, part):
            found += some
            progress.add(len(some))
    return found
