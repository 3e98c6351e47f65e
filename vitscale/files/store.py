"""Where shards, indexes and tables lie: the one way to their bytes."""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from vitscale.errors import TRANSIENT
from vitscale.files.atomic import write_atomically
from vitscale.files.cache import LruCache
from vitscale.files.retry import Result, activity, with_retries

_OPEN_FILES = 256
_PASSED = 1 << 20  # bytes of a pass through a file that are held at once
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
Paths = list[str]


class FileStat(NamedTuple):
    """What a store says of a file without reading it."""

    bytes: int
    modified: int  # nanoseconds, or below 0 what else tells one state of it from another; 0 where a store does not know


def same_file(path: str, seen: FileStat, now: FileStat) -> bool:
    """Whether a file is as it was seen: by size and time; at a URL, where an uploaded copy has a time of its own, by
    size alone."""
    return seen.bytes == now.bytes and (is_remote(path) or seen.modified == now.modified)


class Readable(Protocol):
    """What is asked of files that are only read."""

    def stat(self, path: str) -> FileStat: ...

    def read(self, path: str, start: int, count: int) -> bytes:
        """`count` bytes from `start` on; fewer only where the file ends before."""
        ...


class Store(Readable, Protocol):
    """Files by path. For many threads at once; it can be pickled, for the reader process.

    What fails is an OSError with the path as its `filename`; of these FileNotFoundError where there is no such file.
    """

    def list(self, pattern: str) -> Paths:
        """Paths that a pattern with wildcards (*, ?, [...]) matches, sorted."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """A small file, whole or not at all, its folder made where there is none. Many may write the same at once.

        PermissionError or another OSError where nothing can be written.
        """
        ...

    def fetch(self, path: str, sha256: str | None) -> None:
        """Bring a file near before it is read, where the store does that, and hold it against its sha256."""
        ...


_file_stat = partial(tuple.__new__, FileStat)  # in half the time of FileStat(...): a start asks for many shards


class LocalFiles:
    """Files of this machine or a mounted file system; those read most recently stay open."""

    def __init__(self, patience_s: float = 0.0) -> None:
        """patience_s: how long what a network file system may get over (EIO, ESTALE, time-outs) is tried again."""
        self._patience_s = patience_s
        self._files: LruCache[str, _File] = LruCache(_File, _OPEN_FILES, lambda _: 1)

    def __reduce__(self) -> tuple[type[LocalFiles], tuple[float]]:
        return type(self), (self._patience_s,)  # open files do not travel

    def list(self, pattern: str) -> Paths:
        """As glob does, but a folder that cannot be read for a while is waited for, not taken for an empty one."""
        return sorted(self._matches(pattern))

    def _matches(self, pattern: str) -> Iterator[str]:
        folder, name = os.path.split(pattern)
        find = self._named if glob.has_magic(name) else self._there
        for each in self._matches(folder) if glob.has_magic(folder) else [folder]:
            try:
                yield from find(each, name)
            except OSError as error:
                if error.errno in TRANSIENT:
                    raise

    def _named(self, folder: str, pattern: str) -> Paths:
        """What of a folder matches; hidden files only a pattern that starts with a dot."""
        names = fnmatch.filter(self._patiently(os.listdir, folder or os.curdir), pattern)
        before = os.path.join(folder, "")
        return [before + name for name in names if name[0] != "." or pattern[0] == "."]

    def _there(self, folder: str, name: str) -> Paths:
        """The path, if it is one."""
        path = os.path.join(folder, name)
        self._patiently(os.lstat, path)
        return [path]

    def stat(self, path: str) -> FileStat:
        """Bytes read after it are of the file that it measured, also where another one took its place."""
        found = self._patiently(os.stat, path)
        self._files.forget(path)
        if stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode) or stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.ESPIPE, "is a pipe, a socket or a device, which cannot be read at a place", path)
        return _file_stat((found.st_size, found.st_mtime_ns))

    def _patiently(self, call: Callable[[str], Result], path: str) -> Result:
        """What a call of the kernel gives, made again where its failure may pass."""
        try:
            return call(path)
        except OSError as error:
            if not self._patience_s:
                raise
            failed = error
        return with_retries(partial(call, path), path, self._patience_s, failed)

    def read(self, path: str, start: int, count: int) -> bytes:
        try:
            return self._read(path, start, count)
        except OSError as error:
            if not self._patience_s:
                raise
            failed = error

        def reopened() -> bytes:
            self._files.forget(path)  # a stale handle stays stale
            return self._read(path, start, count)

        return with_retries(reopened, path, self._patience_s, failed)

    def _read(self, path: str, start: int, count: int) -> bytes:
        file = self._files.get(path)  # referenced until it is read, or another thread's eviction would close it
        data = os.pread(file.descriptor, count, start)
        activity.count += 1
        while len(data) < count and (more := os.pread(file.descriptor, count - len(data), start + len(data))):
            data += more
        return data

    def write(self, path: str, data: bytes) -> None:
        write_atomically(Path(path), data)
        self._files.forget(path)

    def fetch(self, path: str, sha256: str | None) -> None:
        """It is as near as it gets."""


def is_remote(path: str) -> bool:
    """Whether this is a URL, not a path."""
    return _URL.match(path) is not None


def split_existing(path: str) -> tuple[str, str]:
    """The folders that are there, whatever their names look like, and what is left: a name, or a pattern."""
    folder, rest = ("/" if path.startswith("/") else ""), [part for part in path.split("/") if part]
    while rest and os.path.isdir(os.path.join(folder, rest[0])):
        folder = os.path.join(folder, rest.pop(0))
    return folder, "/".join(rest)


def absolute(path: str) -> str:
    """A path from the root on; a URL as it is."""
    return path if is_remote(path) else os.path.abspath(path)


def read_pieces(store: Store, path: str, size: int = 8 << 20) -> Iterator[bytes]:
    """A file's bytes, so many at once."""
    start = 0
    while data := store.read(path, start, size):
        yield data
        start += len(data)


class OnePass:
    """A file that is read from its front to its end by reads that never go back, and hashed as it passes."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self._pieces = read_pieces(store, path, _PASSED)
        self._digest = hashlib.sha256()
        self._held, self._start = b"", 0  # bytes that have come and may still be asked for; where they begin

    def stat(self, path: str) -> FileStat:
        return self._store.stat(path)

    def read(self, path: str, start: int, count: int) -> bytes:
        assert start >= self._start, "one pass does not go back"
        while start + count > self._start + len(self._held) and (piece := next(self._pieces, b"")):
            self._digest.update(piece)
            kept = self._held[start - self._start :]
            self._start += len(self._held) - len(kept)
            self._held = kept + piece
        return self._held[start - self._start : start - self._start + count]

    def sha256(self) -> str:
        """In hex, of the whole file, whose rest is read."""
        for piece in self._pieces:
            self._digest.update(piece)
        return self._digest.hexdigest()


def sha256_of(path: str | Path, store: Store | None = None) -> str:
    """In hex, of a file's bytes; store: where it lies (default: on this machine)."""
    digest = hashlib.sha256()
    for piece in read_pieces(store or LocalFiles(), str(path)):
        digest.update(piece)
    return digest.hexdigest()


class _File:
    """An open file that closes with the last reference to it."""

    def __init__(self, path: str) -> None:
        # Without waiting for whoever writes into it, should it be a pipe: reading that fails at once.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
