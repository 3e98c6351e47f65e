"""What a verb that goes through images says on stderr, and the exit code that follows."""

from __future__ import annotations

import time
from typing import TextIO

from vitscale.inference.images import ImageBatch
from vitscale.run_folder import BAD_INPUT, DONE, FAILED
from vitscale.text import TerminalLine, printable


class Tally(TerminalLine):
    """Counts images; names the bad ones at once, and shows the count where stderr is a terminal."""

    def __init__(self, shows_count: bool = True, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.good, self.bad, self._before = 0, 0, 0
        self._shows_count = shows_count and self._in_place
        self._start = time.monotonic()

    def add(self, batch: ImageBatch) -> None:
        for entry in batch.entries:
            if entry.bad is not None:
                self.skip(entry.name, entry.bad)
        self.good += len(batch.names)
        if self._shows_count:
            speed = (self.good - self._before) / max(time.monotonic() - self._start, 1e-9)
            bad = f"  {self.bad} skipped" if self.bad else ""
            self.rewrite(f"{self.good} images  {speed:,.1f} images/s{bad}")

    def done_before(self, count: int) -> None:
        """Count images that an earlier command has done."""
        self.good += count
        self._before += count

    def skip(self, name: str, reason: str) -> None:
        self.bad += 1
        self.say(printable(f"{name}: skipped: {reason}"))

    def exit_code(self) -> int:
        """0 where every image was good, 1 where some were skipped, 2 where none was left."""
        self.close()
        if not self.good:
            self.say("vitscale: error: no image could be read" if self.bad else "vitscale: error: no images were named")
            return BAD_INPUT
        if self.bad:
            self.say(f"{self.bad} of {self.good + self.bad} images were skipped")
        return FAILED if self.bad else DONE
