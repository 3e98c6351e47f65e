"""Remote files on this node's disk: each downloaded once, whoever asks, and thrown out when others need the room.

FOLDER/HASH.data is a whole file: it got its name once all bytes were on disk and held against the sha256 that is known.
HASH.json says what it is. Who downloads or throws out holds the lock of HASH.lock, or of cache.lock; the kernel frees
them when a process ends, however it ends. What an ended process left half done is HASH.part, and begun again.

A disk may fail where a network does not: a file that it does not give is downloaded again, and where that fails too,
this process reads without the cache from then on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TypeVar

from vitscale.errors import TRANSIENT, ConfigError, DataError, StorageError
from vitscale.files.atomic import flush_to_disk, replaced, write_atomically
from vitscale.files.retry import UnavailableError, activity
from vitscale.files.store import FileStat, Paths, Store, sha256_of
from vitscale.text import to_stderr
from vitscale.world import host

_PIECE = 8 << 20  # bytes of one request
_REQUESTS = 4  # of one download, at once
_LEFT_FREE = 0.05  # of the disk, where data.cache_bytes does not say how much may be used
_POLL_S = 0.05
_TOUCHED_EVERY_S = 60.0  # a file that is read: its time says when it was used, to within this
_OURS = "[0-9a-f]" * 32  # names of files: a user's own may lie beside them, as data.cache may be any folder
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a disk gives that fails: a bad sector, a device that is gone, a file system that is damaged or was made read-only
# by that. What else the kernel refuses, the config can mend.
_FAILING = TRANSIENT | {errno.EROFS, errno.EUCLEAN, errno.EBADMSG, errno.ENODEV, errno.ENXIO}
File = TypeVar("File")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class DiskCache:
    """A Store of what another store has, read from this node's disk. For many threads, processes and jobs at once."""

    def __init__(self, store: Store, folder: str, most_bytes: int | None, ranges: Store | None = None) -> None:
        """most_bytes: of all files together; None: as much as the disk has, but for a twentieth. ranges: how the store
        is read where the disk fails."""
        self._store, self._folder, self._most_bytes = store, Path(folder), most_bytes
        self._ranges = ranges or store
        self._stats: dict[str, FileStat] = {}
        self._opened: dict[str, float] = {}  # local path that this process has looked at -> when it last said so there
        # Local path at which the disk has failed -> when its bytes were good again; infinite: not yet.
        self._suspects: dict[str, float] = {}
        self._failure = ""  # of the disk, for good
        self._failing = Lock()

    def __reduce__(self) -> tuple[type[DiskCache], tuple[Store, str, int | None, Store]]:
        return type(self), (self._store, str(self._folder), self._most_bytes, self._ranges)

    def list(self, pattern: str) -> Paths:
        return self._store.list(pattern)

    def stat(self, path: str) -> FileStat:
        stat = self._stats[path] = self._store.stat(path)
        return stat

    def write(self, path: str, data: bytes) -> None:
        self._store.write(path, data)

    def read(self, path: str, start: int, count: int) -> bytes:
        while (local := self._here(path, None)) is not None:
            began = time.monotonic()
            try:
                self._touch(local, began)
                return _read(local, start, count)
            except FileNotFoundError:  # thrown out by another process just now
                self._opened.pop(local, None)
            except OSError as error:
                self._failed(local, error, again=self._suspects.get(local, math.inf) <= began)
        return self._without(path, start, count)

    def fetch(self, path: str, sha256: str | None) -> None:
        """See Store.fetch. What was read here before may have been thrown out since."""
        self._here(path, sha256, anew=True)

    def _here(self, path: str, sha256: str | None, anew: bool = False) -> str | None:
        """The file on this node's disk, downloaded where it is not there; None where the disk has failed for good.
        anew: looked for again, and used by that."""
        stat = self._stats.get(path) or self.stat(path)
        name = hashlib.blake2b(f"{path} {stat.bytes} {stat.modified}".encode(), digest_size=16).hexdigest()
        local = str(self._folder / f"{name}.data")
        if anew:
            self._opened.pop(local, None)
        crowded = False  # by other downloads, on a full disk: one after the other, then
        while local not in self._opened and not self._failure:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                turn = _locked(self._folder / "turn.lock") if crowded else contextlib.nullcontext()
                with turn, _locked(self._folder / f"{name}.lock"):
                    if not self._is_good(local, stat, sha256):
                        self._make_room(stat.bytes, path)
                        self._download(path, stat, sha256, local, crowded)
                    os.utime(local)  # the one used last is thrown out last
                self._opened[local] = time.monotonic()
                if local in self._suspects:
                    self._suspects[local] = self._opened[local]
            except OSError as error:
                if error.filename == path:
                    raise  # the other store's
                if error.errno in _FULL and not crowded:
                    crowded = True
                elif not isinstance(error, FileNotFoundError):  # else thrown out by another process just now
                    self._failed(local, error, again=local in self._suspects)
        return None if self._failure else local

    def _touch(self, local: str, now: float) -> None:
        """Keep a file that is read for hours from looking old."""
        if now - self._opened.get(local, now) >= _TOUCHED_EVERY_S:
            self._opened[local] = now
            os.utime(local)

    def _failed(self, local: str, error: OSError, again: bool) -> None:
        """The disk has failed at a file: have its bytes looked at, or, where it has failed again since, do without the
        disk. ConfigError for what is no failure of a disk."""
        if error.errno not in _FAILING:
            raise self._unusable(error) from None
        with self._failing:  # one warning, whatever the threads
            self._opened.pop(local, None)
            self._suspects.setdefault(local, math.inf)
            if again and not self._failure:
                self._failure = f"data.cache={self._folder}: the disk of {host()} fails ({error.strerror})"
                to_stderr(f"warning: {self._failure}: this process reads by ranges, without it; have that disk seen to")

    def _without(self, path: str, start: int, count: int) -> bytes:
        """By ranges. StorageError where the storage fails too, or its config says that this cannot be."""
        try:
            return self._ranges.read(path, start, count)
        except (UnavailableError, ConfigError) as error:
            why = error.strerror if isinstance(error, UnavailableError) else str(error)
            raise StorageError(
                f"{self._failure}, and {path} cannot be read without it: {why}; start the run again without that node, "
                "or once the storage answers"
            ) from None

    def _is_good(self, local: str, stat: FileStat, sha256: str | None) -> bool:
        """Whether the file is there and whole. After a start of the machine, and where the disk has failed at it, its
        bytes are read once more."""
        try:
            if os.stat(local).st_size != stat.bytes:
                return False
            about = json.loads(_about(local).read_text(encoding="utf-8"))
            if sha256 not in (None, about["sha256"]):
                return False
            if about["boot"] != _boot() or self._suspects.get(local) == math.inf:
                if sha256_of(local) != about["sha256"]:
                    return False
                write_atomically(_about(local), json.dumps(about | {"boot": _boot()}))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        except OSError as error:
            if error.errno not in _FAILING:
                raise
            return False  # another file in its place gets other sectors
        return True

    def _download(self, path: str, stat: FileStat, sha256: str | None, local: str, has_turn: bool) -> None:
        """By several requests at once, in order onto the disk. DataError where the bytes are not those of the index."""
        draft, digest = Path(local).with_suffix(".part"), hashlib.sha256()
        starts = range(0, stat.bytes, _PIECE)
        with open(draft, "wb") as stream, ThreadPoolExecutor(_REQUESTS) as pool:
            asked = [pool.submit(self._store.read, path, start, _PIECE) for start in starts[:_REQUESTS]]
            for number, _ in enumerate(starts):
                piece = asked[number].result()
                asked[number] = asked[0]  # its bytes are let go
                if number + _REQUESTS < len(starts):
                    asked.append(pool.submit(self._store.read, path, starts[number + _REQUESTS], _PIECE))
                digest.update(piece)
                self._write(stream.fileno(), piece, draft, has_turn)
        size = draft.stat().st_size
        if size != stat.bytes or sha256 not in (None, digest.hexdigest()):
            draft.unlink()
            what = (
                f"has {size} bytes of {stat.bytes}" if size != stat.bytes else "has another sha256 than the index says"
            )
            raise DataError(f"{path}: {what}: it was written again or came damaged; make a new index (vitscale index)")
        flush_to_disk(draft)
        about = {"of": path, "sha256": digest.hexdigest(), "boot": _boot()}
        with replaced(_about(local)) as draft_about, open(draft_about, "wb") as stream:
            self._write(stream.fileno(), json.dumps(about).encode(), draft, has_turn)
        os.replace(draft, local)

    def _write(self, descriptor: int, piece: bytes, draft: Path, has_turn: bool) -> None:
        """draft: what gives way on a full disk; has_turn: what others download ends, or gives way, before it does."""
        view, alone = memoryview(piece), False
        while view:
            try:
                view, alone = view[os.write(descriptor, view) :], False
            except OSError as error:
                if error.errno in _FULL:
                    self._remove_left_over()
                    others = any(path != draft for path in self._folder.glob(f"{_OURS}.part"))
                    if self._throw_out(len(view)):
                        continue
                    if has_turn and (others or not alone):
                        alone = not others  # asked once more: the last one may have given way just now
                        activity.count += 1
                        time.sleep(_POLL_S)
                        continue
                    draft.unlink()
                raise OSError(error.errno, error.strerror, str(self._folder)) from None

    def _make_room(self, size: int, path: str) -> None:
        self._remove_left_over()
        if self._most_bytes is None:
            usage = shutil.disk_usage(self._folder)
            missing = size + int(_LEFT_FREE * usage.total) - usage.free
        else:
            if size > self._most_bytes:
                raise ConfigError(
                    f"data.cache_bytes={self._most_bytes}: {path} alone has {size}; allow for several of its size, or "
                    "set data.cache=null"
                )
            missing = size + sum(each.stat().st_size for each in self._files()) - self._most_bytes
        self._throw_out(missing)

    def _throw_out(self, count: int) -> bool:
        """Remove the files used longest ago until so many bytes are gone; whether any were removed."""
        if count <= 0:
            return False
        with _locked(self._folder / "cache.lock"):
            stats = [(path, path.stat()) for path in self._files()]
            old = used_longest_ago([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats], count)
            for path in old:
                for suffix in (".data", ".json"):  # a lock may be somebody's
                    path.with_suffix(suffix).unlink(missing_ok=True)
        return bool(old)

    def _remove_left_over(self) -> None:
        """Drafts of processes that were killed, and locks of files that are gone, unless somebody holds them now."""
        for path in [*self._folder.glob(f"{_OURS}.part"), *self._folder.glob(f"{_OURS}.lock")]:
            lock = path.with_suffix(".lock")
            if path.suffix == ".lock" and path.with_suffix(".data").exists():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                if _try_lock(descriptor) and _is_of(descriptor, lock):
                    for draft in (path.with_suffix(".part"), *self._folder.glob(f".{path.stem}.json.*.tmp")):
                        draft.unlink(missing_ok=True)
                    if not path.with_suffix(".data").exists():
                        lock.unlink(missing_ok=True)
            finally:
                os.close(descriptor)

    def _files(self) -> Sequence[Path]:
        return [path for path in self._folder.glob(f"{_OURS}.data") if path.exists()]

    def _unusable(self, error: OSError) -> ConfigError:
        if error.errno in _FULL:
            way_out = "its disk is full, and nothing in it is of this cache: make room, name another folder"
        else:
            way_out = f"cannot be used ({error.strerror}): name a folder of this node that can be written"
        return ConfigError(f"data.cache={self._folder}: {way_out}, or set data.cache=null")


def used_longest_ago(files: Iterable[tuple[File, int, int]], count: int) -> list[File]:
    """Which of (file, bytes, when it was used) are thrown out so that `count` bytes are gone."""
    gone, old = 0, []
    for file, size, _ in sorted(files, key=lambda each: each[2]):
        if gone >= count:
            break
        gone += size
        old.append(file)
    return old


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which whoever held it before may have removed meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            while not _try_lock(descriptor):
                activity.count += 1  # whoever holds it is watched by its own parent
                time.sleep(_POLL_S)
            if _is_of(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)


def _is_of(descriptor: int, path: Path) -> bool:
    """Whether the file that is open here is still the one of that name."""
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: str, start: int, count: int) -> bytes:
    """Opened each time: an open file that was thrown out would keep its room on the disk."""
    with open(path, "rb", buffering=0) as stream:
        stream.seek(start)
        data = stream.read(count)
        while len(data) < count and (more := stream.read(count - len(data))):
            data += more
    return data


def _about(local: str) -> Path:
    return Path(local).with_suffix(".json")


def _boot() -> str:
    """What tells one start of this machine from another."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""
