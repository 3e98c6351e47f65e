"""Who has a run's folder: a lease that needs no locks of the file system, which other machines may not see.

It is the file lock-N of the highest N. Whoever makes lock-N+1 follows its holder, and since a file is made with O_EXCL,
which NFS keeps too, that is one alone, however many try. The holder counts in its file while it lives. Whether it does
is told by its process where that is on this machine; elsewhere by the count alone, so that no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from vitscale.errors import LaunchError
from vitscale.text import to_stderr

BEAT_S = 5.0  # between two counts
EXPIRES_S = 60.0  # of looking at a count that stays the same
_LOOK_S = 0.5
_FIRST = b"0000000000"  # the count at first
_FREE = b"free      "  # in place of it, of as many bytes
_STARTING = "starting"  # a file as those of leases
NOBODY = "nobody"
_GONE = (errno.ENOENT, errno.ESTALE)


class FolderInUse(LaunchError):
    """Another process runs in this folder."""


class FolderLost(LaunchError):
    """Another process has taken the folder, since this one gave no sign of life; or it is gone."""


class Lease:
    """What `take` gives: a thread counts in the file until `release`."""

    def __init__(self, path: Path, own: bytes) -> None:
        """own: the file's content behind the count."""
        self._path, self._own, self._count = path, own, 0
        self._lost, self._looked = False, time.monotonic()
        self._missed: float | None = None  # since when the file is not found
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """FolderLost if another run has the folder now, or if it is gone. Cheap: it looks only if the thread has not
        done so lately, as in a process that was stopped for a while."""
        if time.monotonic() - self._looked > 2 * BEAT_S:
            self._beat()
        if self._lost:
            folder = self._path.parent
            raise FolderLost(
                f"{folder}: this process gave no sign of life for {EXPIRES_S:g} s, and {holder(folder)} has taken the "
                "run; it ends here without writing any more"
            )
        if self._missed is not None and self._looked - self._missed > EXPIRES_S:
            raise folder_gone(self._path.parent)

    def release(self) -> None:
        """Let another have the folder."""
        self._released.set()
        self._thread.join(BEAT_S)
        if self._thread.is_alive():  # in a file system that hangs: the lease expires by itself
            return
        with contextlib.suppress(OSError):
            self._write(_FREE)

    def _beat_on(self) -> None:
        while not self._released.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        now = time.monotonic()
        try:
            self._count += 1
            self._write(b"%010d" % self._count)
            self._missed = None
        except OSError as error:  # one may pass, as ESTALE on NFS does: others look for much longer
            if error.errno in _GONE:
                self._missed = now if self._missed is None else self._missed
                self._lost |= self._is_followed()
        self._looked = now

    def _write(self, count: bytes) -> None:
        """Put it in the place of the count; FileNotFoundError where the file is not there, or is another one's."""
        # Opened each time: a look by stat NFS answers from what it remembers, and a descriptor can be stale for good.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(descriptor, len(_FREE) + len(self._own), len(_FREE)) != self._own:
                raise FileNotFoundError(errno.ENOENT, "is another one's", str(self._path))
            os.pwrite(descriptor, count, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _is_followed(self) -> bool:
        """Whether another one's lease is there: a later one, or in a new folder one of the same number."""
        with contextlib.suppress(OSError):
            newest, own = max(_leases(self._path.parent), default=0), int(self._path.name[5:])
            return newest > own or (newest == own and self._path.read_bytes()[len(_FREE) :] != self._own)
        return False


def take(folder: Path, job: str | None = None) -> Lease:
    """Have the folder from now on; job: of the scheduler, for messages. FolderInUse if another one lives in it."""
    while True:
        number = _await_free(folder, 0.0) + 1
        path = folder / f"lock-{number}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except FileExistsError:  # another one was quicker
            continue
        own = _signature(job)
        os.write(descriptor, _FIRST + own)
        os.fsync(descriptor)  # other nodes look whether they see it too
        os.close(descriptor)
        leases = _leases(folder)
        if max(leases) == number:
            for older in set(leases) - {number}:
                (folder / f"lock-{older}").unlink(missing_ok=True)
            return Lease(path, own)
        # While this one hesitated, others had the number, let go of it and took it away.
        path.unlink()


def folder_gone(folder: Path) -> FolderLost:
    """What ends a run under which its folder was taken away."""
    return FolderLost(
        f"{folder}: the folder is gone: moved, removed, or on storage that is no longer there; bring it back to this "
        "place, and the same command goes on from its newest checkpoint"
    )


def announce(folder: Path) -> None:
    """Say that a run is about to start in the folder, which its rank 0 takes later; until `withdraw`."""
    with contextlib.suppress(OSError):  # it helps whoever wants to stop the run, and no more
        (folder / _STARTING).write_bytes(_FIRST + _signature(None))


def withdraw(folder: Path) -> None:
    """The run has the folder, or will not start."""
    with contextlib.suppress(OSError):
        (folder / _STARTING).unlink(missing_ok=True)


def is_announced(folder: Path) -> bool:
    """Whether a run is about to start there, as far as can be told from this machine."""
    with contextlib.suppress(OSError):
        return _lives((folder / _STARTING).read_bytes()) is not False
    return False


def require_free(folder: Path, patience_s: float = 0.0, report: Callable[[str], None] = to_stderr) -> None:
    """FolderInUse if another process lives in the folder, and still does after `patience_s`."""
    _await_free(folder, patience_s, report)


def holder(folder: Path) -> str:
    """What the process that holds the folder, or held it last, says of itself; no two starts say the same."""
    lines = _read(folder)[1].decode().splitlines()
    return lines[1] if len(lines) > 1 else NOBODY


def _await_free(folder: Path, patience_s: float, report: Callable[[str], None] = to_stderr) -> int:
    """The number of the last lease, whose holder has let go of it or is dead; 0 if there was none."""
    began = since = time.monotonic()
    seen: bytes | None = None
    while True:
        number, content = _read(folder)
        lives, now = _lives(content), time.monotonic()
        if content != seen:
            if lives is None and seen is None:
                report(f"{folder}: looking whether {holder(folder)} lives: at most {EXPIRES_S:g} s")
            elif lives is None:
                lives = True
            seen, since = content, now
        elif lives is None and now - since > EXPIRES_S:
            lives = False
        if lives is False:
            return number
        if lives and now - began >= patience_s:
            raise FolderInUse(
                f"run.name={folder.name!r}: {folder} is in use by {holder(folder)}; wait for it, stop it with "
                f"`vitscale stop {folder}`, or choose another run.name"
            )
        time.sleep(_LOOK_S)


def _leases(folder: Path) -> list[int]:
    return [int(name[5:]) for name in os.listdir(folder) if re.fullmatch(r"lock-\d+", name)]


def _read(folder: Path) -> tuple[int, bytes]:
    """Number and content of the last lease; without any, 0 and that of one that was let go of."""
    began = time.monotonic()
    while True:
        number = max(_leases(folder), default=0) if folder.exists() else 0
        if number == 0:
            return 0, _FREE
        try:
            return number, (folder / f"lock-{number}").read_bytes()
        except OSError as error:  # taken away meanwhile; NFS may list it for a while
            if error.errno not in _GONE or time.monotonic() - began > EXPIRES_S:
                raise
            time.sleep(_LOOK_S / 10)


def _lives(content: bytes) -> bool | None:
    """Whether the holder of a lease lives; None where only its count can tell."""
    lines = content.decode().splitlines()
    if content.startswith(_FREE):
        return False
    if len(lines) < 3 or not content.endswith(b"\n"):  # it is just being written
        return None
    machine, pid, started = lines[2].split()
    return None if machine != _machine() else _started(int(pid)) == started


def _machine() -> str:
    """What process numbers are valid in: a boot of a machine, and there a container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str | None:
    """When a process was started, in ticks since boot, since its number may be used again; None: it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _signature(job: str | None) -> bytes:
    """What a lease says behind its count: who has it, in words and for `_lives`."""
    return f"\n{_myself(job)}\n{_machine()} {os.getpid()} {_started(os.getpid())}\n".encode()


def _myself(job: str | None) -> str:
    of_job = "" if job is None else f", job {job},"
    return f"process {os.getpid()} on {socket.gethostname()}{of_job} since {datetime.now().isoformat(' ')}"
