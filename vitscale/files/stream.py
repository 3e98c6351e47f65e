"""Files of servers that know no ranges: each comes whole, from its front, however little of it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Generator
from threading import Lock

WINDOW = 32 << 20  # bytes that readers of one file may be apart: as many as DiskCache asks for at once


class Stream:
    """A file read in one pass, by threads that go about in step: what one passes over is held for the others."""

    def __init__(self, begin: Callable[[int], Generator[bytes, None, None]], size: int) -> None:
        """begin: the file's pieces from a byte on, none of them empty."""
        self._begin, self._size, self._lock = begin, size, Lock()
        self._close()

    def _close(self) -> None:
        self._pieces: Generator[bytes, None, None] | None = None
        self._held, self._start = bytearray(), 0  # the latest bytes, and where they begin
        self._given = 0  # bytes in all

    def read(self, start: int, count: int) -> bytes:
        count = min(count, self._size - start)
        if count <= 0:
            return b""
        with self._lock:
            try:
                data = self._read(start, count)
            except BaseException:
                self._close()  # a generator that has raised is at its end
                raise
            self._given += len(data)
            if self._given >= self._size:
                self._close()
            return data

    def _read(self, start: int, count: int) -> bytes:
        if self._pieces is None or not self._start <= start <= self._start + len(self._held) + WINDOW:
            self._close()
            self._start = 0 if start <= WINDOW else start
            self._pieces = self._begin(self._start)
        while self._start + len(self._held) < start + count and (piece := next(self._pieces, b"")):
            self._held += piece
            if (old := start - WINDOW - self._start) > 0:
                del self._held[:old]
                self._start += old
        return bytes(self._held[start - self._start : start - self._start + count])
