"""What passes between a loader and its reader process: pixels in shared memory, everything else as messages.

Both ends are this package in the same version, and the pipes are private to parent and child, so messages
are pickles.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitscale.data.batch import Batch
from vitscale.errors import VitscaleError

FREE = struct.Struct("<I")  # what the loader writes for each memory that may be filled: its number
_LENGTH = struct.Struct("<Q")
_STEP = 2 << 20  # memory grows by whole huge pages


@dataclass(frozen=True, eq=False)
class Filled:
    """Micro-batch `number` lies in its memory; `batch` has all but the pixels."""

    number: int
    bytes: int
    batch: Batch


@dataclass(frozen=True)
class Failed:
    """Micro-batch `number` cannot be had: by an error of the data or its storage, or by what a traceback tells."""

    number: int
    error: VitscaleError | None
    traceback: str = ""


@dataclass(frozen=True)
class Alive:
    """The reader has read or decoded something since its last message."""


@dataclass(frozen=True, eq=False)
class Work:
    """What a reader is started with."""

    plan: Any  # a Plan
    first: list[int]  # the micro-batch that each memory takes first


class SharedMemory:
    """An unnamed file in memory (memfd) that parent and child both map: gone when both are, however they end."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.mapped = np.zeros(0, dtype=np.uint8)  # the whole file, as of the last `reserve` or `view`

    @classmethod
    def create(cls) -> SharedMemory:
        return cls(os.memfd_create("vitscale-batch", os.MFD_CLOEXEC))

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


def send(descriptor: int, message: Any) -> None:
    """Write one message to a pipe."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    data = memoryview(_LENGTH.pack(len(body)) + body)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """The next message of a pipe. EOFError when the other end is gone."""
    return pickle.loads(_exactly(descriptor, _LENGTH.unpack(_exactly(descriptor, _LENGTH.size))[0]))  # noqa: S301


def _exactly(descriptor: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.read(descriptor, min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
