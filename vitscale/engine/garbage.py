"""When Python looks for garbage in training: at the same steps on all ranks, since all wait for the one that looks.

By itself it looks whenever a rank has made enough objects, once in a while through all that there are: 340,000 to
460,000 with torch and DeepSpeed imported. What the start has made is left out here, and a step makes no cycles of
objects: to look then takes a ten thousandth of that time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 100  # steps


class Garbage:
    """A context around the steps: from the first one's end on, nothing is collected but by `stepped` and `between`.

    `stepped` is called after every step.
    """

    def __init__(self) -> None:
        self._steps = 0

    def __enter__(self) -> Garbage:
        self._was_enabled = gc.isenabled()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def stepped(self) -> None:
        """Set aside what there is after the first step, which compiles and captures; then collect every so often."""
        self._steps += 1
        if self._steps == 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self._steps % EVERY == 0:
            gc.collect()

    @contextmanager
    def between(self) -> Iterator[None]:
        """Between two steps, for as long as the context lasts, Python collects by itself; then once more."""
        if self._was_enabled:
            gc.enable()
        yield
        gc.disable()
        gc.collect()
