"""Stores that tell what was asked of them."""

from __future__ import annotations

import threading
from collections import Counter

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
