"""Stores that tell what was asked of them."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter

from vitscale.files import retry
from vitscale.files.store import FileStat, LocalFiles
from vitscale.files.tar import BLOCK

HEADER = 2 * BLOCK  # bytes that a scan reads at each header; no image of these tests has as many


class CountingFiles(LocalFiles):
    """Local files, with all that was asked of them counted; where `read_only`, nothing can be written."""

    def __init__(self, read_only: str | None = None) -> None:
        super().__init__()
        self.read_only = read_only  # the start of such paths
        self.stats: Counter[str] = Counter()
        self.reads: Counter[tuple[str, int, int]] = Counter()  # path, start, bytes asked for
        self.readers: set[str] = set()  # names of the threads that read headers
        self._counting = threading.Lock()

    def __reduce__(self) -> tuple[type[CountingFiles], tuple[str | None]]:  # type: ignore[override]
        return type(self), (self.read_only,)

    def stat(self, path: str) -> FileStat:
        with self._counting:
            self.stats[path] += 1
        return super().stat(path)

    def read(self, path: str, start: int, count: int) -> bytes:
        with self._counting:
            self.reads[path, start, count] += 1
            if count == HEADER:
                self.readers.add(threading.current_thread().name)
        return super().read(path, start, count)

    def write(self, path: str, data: bytes) -> None:
        if self.read_only is not None and path.startswith(self.read_only):
            raise PermissionError(13, "Permission denied", path)
        super().write(path, data)

    @property
    def headers(self) -> Counter[tuple[str, int]]:
        """How often each place in a shard was read as a header."""
        return Counter({(path, start): times for (path, start, count), times in self.reads.items() if count == HEADER})


class TroubledFiles(LocalFiles):
    """Local files whose shards fail to be read by turns; waits are short, in whatever process it is."""

    def __init__(self, patience_s: float, errors: tuple[int, ...], every: int) -> None:
        """errors: of the reads that fail, in turn, one read in `every`; 1: all."""
        super().__init__(patience_s)
        retry._FIRST_WAIT_S, retry._LONGEST_WAIT_S = 0.001, 0.01
        self._settings = (patience_s, errors, every)
        self._numbers = itertools.count(1)

    def __reduce__(self) -> tuple[type[TroubledFiles], tuple[float, tuple[int, ...], int]]:  # type: ignore[override]
        return type(self), self._settings

    def _read(self, path: str, start: int, count: int) -> bytes:
        _, errors, every = self._settings
        number = next(self._numbers)
        if path.endswith(".tar") and number % every == 0:
            code = errors[number // every % len(errors)]
            raise OSError(code, os.strerror(code))
        return super()._read(path, start, count)
