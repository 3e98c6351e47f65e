"""What fails for a while, as servers and network file systems do: tried again within bounds, and counted."""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from threading import Lock
from typing import TypeVar

from vitscale.errors import TRANSIENT, DataError, StorageError, VitscaleError
from vitscale.text import to_stderr

Result = TypeVar("Result")

PATIENCE_S = 300.0
_LEAST_ATTEMPTS = 8
_FEW_ATTEMPTS = 4  # at what is hardly going to pass
_REPORT_EVERY_S = 10.0
_SLICE_S = 0.25  # of a pause
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 30.0
SILENT_S = 30.0  # a server may send no byte for so long
_SLOWEST, _SLOW_S = 1024, 30.0  # bytes a second over so many seconds: slower is as good as stalled
_BUSY, _NEVER = (408, 425, 429), (501, 505)  # HTTP, beside 5xx, and of 5xx: what a server cannot do now or later


class Again(Exception):
    """An attempt that failed in a way that may pass."""

    def __init__(self, why: str, after_s: float = 0.0, at_last: Exception | None = None) -> None:
        """after_s: how long the server wants to be left alone; at_last: what it comes to after a few such attempts."""
        super().__init__(why)
        self.after_s, self.at_last = after_s, at_last


class UnavailableError(OSError):
    """Storage that kept failing for longer than the patience: nothing that the data or the config could mend."""


def unreadable(path: str, error: OSError, where: str = "") -> VitscaleError:
    """The error for bytes that cannot be had: the data's fault, or the storage's."""
    if isinstance(error, UnavailableError):
        return StorageError(f"{path}: its storage failed{where}: {error.strerror}; start the run again once it answers")
    return DataError(f"{path}: cannot be read{where}: {error.strerror}")


class _Activity:
    """A number that grows while bytes come or images are decoded: who watches it sees a process that hangs.

    Several threads add to it without a lock: a lost addition is of no account.
    """

    count = 0


activity = _Activity()


class _Count:
    """How many attempts of this process failed and were made again. For many threads at once."""

    def __init__(self) -> None:
        self._lock, self._count = Lock(), 0

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def __int__(self) -> int:
        return self._count


retries = _Count()


class _Reporter:
    """To standard error now and then: a wait of minutes is not to look like a hang."""

    def __init__(self) -> None:
        self._lock, self._next = Lock(), 0.0

    def __call__(self, line: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _REPORT_EVERY_S
        to_stderr(f"storage: {line}")


_report = _Reporter()


class Attempts:
    """The attempts at one piece of work: at least 8 of them, and for at least `patience_s`; where a server says how
    long it wants to be left alone, `patience_s` alone counts.

    The waits between them double up to 30 s, with jitter, so that a thousand readers do not come back at once.
    """

    def __init__(self, path: str, patience_s: float) -> None:
        self._path, self._patience_s = path, patience_s
        self.progressed()

    def progressed(self) -> None:
        """Something came: what fails from now on is looked at anew."""
        self._failed, self._hopeless, self._began = 0, 0, time.monotonic()

    def failed(self, error: Again) -> None:
        """Wait before the next attempt. UnavailableError, or what the error comes to, where there were enough."""
        self._failed += 1
        self._hopeless = self._hopeless + 1 if error.at_last is not None else 0
        if error.at_last is not None and self._hopeless >= _FEW_ATTEMPTS:
            raise error.at_last
        waited, after_s = time.monotonic() - self._began, error.after_s
        if (self._failed >= _LEAST_ATTEMPTS or after_s > 0) and waited + after_s >= self._patience_s:
            tried = f"{error}; {self._failed} attempts in {waited:.0f} s"
            raise UnavailableError(errno.ETIMEDOUT, tried, self._path)
        retries.add()
        _report(f"{self._path}: {error}; attempt {self._failed + 1} follows")
        pause = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (self._failed - 1)) * random.uniform(0.5, 1.0)
        ends = time.monotonic() + max(pause, min(after_s, self._patience_s))
        while (left := ends - time.monotonic()) > 0:
            activity.count += 1  # who waits for storage does not hang
            time.sleep(min(left, _SLICE_S))


def may_pass(status: int) -> bool:
    """Whether a server that answers so may answer otherwise later."""
    return status in _BUSY or (status >= 500 and status not in _NEVER)


def with_retries(
    work: Callable[[], Result], path: str, patience_s: float, failed: OSError | Again | None = None
) -> Result:
    """What `work` gives, which is called again where it raises Again or a transient OSError. See Attempts.

    failed: what it has raised, where it was called before.
    """
    attempts = Attempts(path, patience_s)
    while True:
        if isinstance(failed, OSError):
            if isinstance(failed, UnavailableError) or failed.errno not in TRANSIENT:
                raise failed
            failed = Again(failed.strerror or str(failed))
        if failed is not None:
            attempts.failed(failed)
        try:
            return work()
        except (OSError, Again) as error:
            failed = error


def resumed(
    ask: Callable[[int], Generator[bytes, None, None]], path: str, patience_s: float
) -> Generator[bytes, None, None]:
    """The pieces of a transfer, which goes on where it broke. See Attempts.

    ask: gives what lies behind so many bytes, by one request; it raises Again where that breaks.
    """
    attempts, done = Attempts(path, patience_s), 0
    while True:
        before = done
        try:
            with contextlib.closing(ask(done)) as pieces:
                for piece in pieces:
                    done += len(piece)
                    yield piece
            return
        except Again as error:
            if done > before:
                attempts.progressed()
            attempts.failed(error)


def paced(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces as they come. Again where they come too slowly, by the time that is spent waiting for them."""
    waiting, received, left = 0.0, 0, iter(pieces)
    while True:
        began = time.monotonic()
        piece = next(left, None)
        if piece is None:
            return
        activity.count += 1
        waiting, received = waiting + time.monotonic() - began, received + len(piece)
        if waiting > _SLOW_S and received < _SLOWEST * waiting:
            raise Again(f"{received} bytes in {waiting:.0f} s")
        yield piece
