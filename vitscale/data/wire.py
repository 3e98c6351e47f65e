"""The messages between a loader and its reader process; pixels are in shared memory (files/shared_memory.py).

Both ends are this package in the same version, and the pipes are private to parent and child, so messages
are pickles.
"""

from __future__ import annotations

import os
import pickle
import struct
from dataclasses import dataclass
from typing import Any

from vitscale.data.batch import Batch
from vitscale.errors import VitscaleError

FREE = struct.Struct("<I")  # what the loader writes for each memory that may be filled: its number
_LENGTH = struct.Struct("<Q")


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
