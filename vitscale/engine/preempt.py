"""How a run is asked to stop, or to save and go on: files in its folder, TERM, USR1, Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType

from vitscale.checkpoint.store import newest_step
from vitscale.run_folder import INTERRUPTED, STOPPED, STOPPED_EARLY, RunFolder
from vitscale.text import to_stderr
from vitscale.world import World

POLL_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(Exception):
    """All ranks have agreed to stop in the middle of an evaluation."""


class StopRequest:
    """Whether someone wants this run to stop; a context around the run.

    A thread receives the signals, so that one is heard while the main thread waits in a collective; another one looks
    for the files once a second, for as long as their storage takes. A signal counts on whichever rank it reaches; one
    rank a node looks for the stop file, since another node's file system may take a minute to show it. Before the first
    step has ended there is nothing to save: the process then leaves at once, with code 3. Later the loop makes the
    ranks agree. A second Ctrl-C ends the process at once, with code 130.
    """

    def __init__(self, folder: RunFolder, world: World) -> None:
        self._folder, self._world = folder, world
        self._stop = self._save = self._training = False
        self._saving: int | None = None  # the step of the checkpoint that someone waits for
        self._signalled = float("inf")  # when a signal first came
        self._lock = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._ended = threading.Event()
        self._listening = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._looking = threading.Thread(target=self._look_on, name="requests", daemon=True)
        self._before: dict[int, object] = {}  # the handlers

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._listening.start()
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._before:
            signal.set_wakeup_fd(-1)
        self._ended.set()
        self._looking.join(POLL_SECONDS)  # not for longer, where the file system hangs
        self._writer.close()  # which ends the thread
        self._listening.join()
        self._reader.close()

    def requested(self) -> bool:
        """Cheap enough to be asked every step. From the first call on, whoever asks saves before it stops."""
        with self._lock:
            self._training = True
            return self._stop

    def save_requested(self) -> bool:
        """Whether someone waits for a checkpoint, on rank 0; `saving` ends it."""
        return self._save

    def saving(self, step: int) -> None:
        """A save of this step is under way, or of a later one in its place: once it is there the file is taken away,
        which is what `vitscale save` waits for."""
        with self._lock:
            self._save, self._saving = False, step

    def clear(self) -> None:
        """The run has stopped (or ended): take the files away, so that the next start goes on."""
        if self._world.is_main:
            self._folder.clear_requests()

    def _listen(self) -> None:
        while numbers := self._reader.recv(64):
            for number in set(SIGNALS) & set(numbers):
                self._receive(number)

    def _look_on(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        # Another node may still see the file of the run's last start, until rank 0 and the others have joined.
        looks = self._world.is_main or (self._training and self._world.local_rank == 0)
        if looks and os.path.exists(self._folder.stop):
            self._request(by_person=True)
        if self._world.is_main and os.path.exists(self._folder.save):
            self._look_after_save()

    def _look_after_save(self) -> None:
        with self._lock:
            self._save |= self._saving is None
            if self._saving is not None and newest_step(self._folder.checkpoints) >= self._saving:
                self._saving = None
                self._folder.save.unlink(missing_ok=True)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        # One Ctrl-C can come twice: from the terminal, and passed on by torchrun.
        if number == signal.SIGINT and now - self._signalled > 1.0:
            os._exit(INTERRUPTED)
        self._signalled = min(self._signalled, now)
        # torchrun sends TERM to ranks whose neighbour has died; a launcher of ours is asked by the stop file.
        self._request(by_person=number != signal.SIGTERM or not self._world.supervised)

    def _request(self, by_person: bool) -> None:
        with self._lock:
            if self._training:
                self._stop = True
                return
            if by_person:
                if self._folder.write_exit(STOPPED, None, STOPPED_EARLY):
                    to_stderr(f"vitscale: {STOPPED_EARLY}; the same command starts again")
                self.clear()
            os._exit(STOPPED)


def _ignore(number: int, frame: FrameType | None) -> None:
    """The handler in Python: what the signal means is the thread's to decide."""
