"""Memory that a rank and a helper process of its own share."""

from __future__ import annotations

import mmap
import os

import numpy as np

_STEP = 2 << 20  # memory grows by whole huge pages


class SharedMemory:
    """An unnamed file in memory (memfd) that parent and child both map: gone when both are, however they end."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.mapped = np.zeros(0, dtype=np.uint8)  # the whole file, as of the last `reserve` or `view`

    @classmethod
    def create(cls, name: str) -> SharedMemory:
        """name: for who looks into /proc."""
        return cls(os.memfd_create(f"vitscale-{name}", os.MFD_CLOEXEC))

    def reserve(self, count: int) -> np.ndarray:
        """uint8 [at least count], the file grown where it is smaller; what was written before is kept."""
        there = os.fstat(self.descriptor).st_size
        if count > there:
            there = -(-max(count, there * 5 // 4) // _STEP) * _STEP
            os.ftruncate(self.descriptor, there)
        if there != len(self.mapped):
            self._map()
        return self.mapped

    def view(self, count: int) -> np.ndarray:
        """uint8 [count] that the other end has written."""
        if count > len(self.mapped):
            self._map()
        return self.mapped[:count]

    def shrink(self, count: int) -> None:
        """Give back all but the first `count` bytes, while the other end writes nothing; it maps the file anew by its
        next `reserve`. What lay beyond them must not be looked at any more."""
        os.ftruncate(self.descriptor, -(-count // _STEP) * _STEP)
        self._map()

    def close(self) -> None:
        os.close(self.descriptor)

    def _map(self) -> None:
        # An older mapping lives on while arrays point into it.
        self.mapped = np.frombuffer(mmap.mmap(self.descriptor, 0), dtype=np.uint8)
