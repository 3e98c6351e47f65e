"""How a run is asked to stop: a file named `stop` in its folder, SIGTERM, or Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType

POLL_SECONDS = 1.0


class StopRequest:
    """Whether someone wants this run to stop.

    One rank a node looks for the file, at most once a second (another node's file system may take a
    minute to show it); a signal counts on whichever rank it reaches. The loop makes the ranks agree at
    a step's end. Ctrl-C once more ends the process at once.
    """

    def __init__(self, run_folder: Path, looks: bool, clears: bool) -> None:
        self._file = run_folder / "stop"
        self._looks, self._clears = looks, clears
        self._requested = False
        self._looked = -POLL_SECONDS
        self._asked = float("inf")  # when a signal first came
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # One Ctrl-C can come twice: from the terminal, and passed on by torchrun.
        if number == signal.SIGINT and now - self._asked > 1.0:
            raise KeyboardInterrupt
        self._asked = min(self._asked, now)
        self._requested = True

    def requested(self) -> bool:
        """Cheap enough to be asked every step."""
        now = time.monotonic()
        if self._looks and not self._requested and now - self._looked >= POLL_SECONDS:
            self._looked = now
            self._requested = self._file.exists()
        return self._requested

    def honour(self) -> None:
        """The run has stopped (or ended): take the file away, so that the next start goes on."""
        if self._clears:
            self._file.unlink(missing_ok=True)
