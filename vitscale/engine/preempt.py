"""How a run is asked to stop: a file named `stop` in its folder, or SIGTERM."""

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
    minute to show it); SIGTERM counts on whichever rank it reaches. The loop makes the ranks agree at
    a step's end.
    """

    def __init__(self, run_folder: Path, looks: bool, clears: bool) -> None:
        self._file = run_folder / "stop"
        self._looks, self._clears = looks, clears
        self._requested = False
        self._looked = -POLL_SECONDS
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
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
