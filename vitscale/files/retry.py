"""What fails for a while, as servers and network file systems do: tried again within bounds, and counted."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from vitscale.errors import TRANSIENT, DataError, StorageError, VitscaleError
from vitscale.text import to_stderr

Result = TypeVar("Result")

PATIENCE_S = 300.0
_LEAST_ATTEMPTS = 8
_REPORT_EVERY_S = 10.0
_SLICE_S = 0.25  # of a pause
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 30.0


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
        self._failed, self._began = 0, time.monotonic()

    def failed(self, why: str, after_s: float = 0.0) -> None:
        """Wait before the next attempt, at least `after_s`. UnavailableError where there were enough of them."""
        self._failed += 1
        waited = time.monotonic() - self._began
        if (self._failed >= _LEAST_ATTEMPTS or after_s > 0) and waited + after_s >= self._patience_s:
            tried = f"{why}; {self._failed} attempts in {waited:.0f} s"
            raise UnavailableError(errno.ETIMEDOUT, tried, self._path)
        retries.add()
        _report(f"{self._path}: {why}; attempt {self._failed + 1} follows")
        pause = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (self._failed - 1)) * random.uniform(0.5, 1.0)
        ends = time.monotonic() + max(pause, min(after_s, self._patience_s))
        while (left := ends - time.monotonic()) > 0:
            activity.count += 1  # who waits for storage does not hang
            time.sleep(min(left, _SLICE_S))


def with_retries(work: Callable[[], Result], path: str, patience_s: float, failed: OSError | None = None) -> Result:
    """What `work` gives, which is called again where it raises a transient OSError. See Attempts.

    failed: what it has raised, where it was called before.
    """
    attempts = Attempts(path, patience_s)
    while True:
        if failed is not None:
            if isinstance(failed, UnavailableError) or failed.errno not in TRANSIENT:
                raise failed
            attempts.failed(failed.strerror or str(failed))
        try:
            return work()
        except OSError as error:
            failed = error
