"""The process that writes one rank's file of a checkpoint while the rank trains on.

`python -m vitscale.checkpoint.writer PATH MEMORY_FD BYTES PARENT_PID`: standard input brings the file's header, the
memory its values. It hashes what it writes, hands it to the disk, and prints JSON: the file's `bytes` and `sha256`, or
the `error`. It leaves when its parent is gone. No torch, no NumPy: it starts in a moment.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
from collections.abc import Iterator

from vitscale.world import ignore_stops

_CHUNK = 8 << 20


def write(path: str, parts: Iterator[memoryview], parent: int) -> dict[str, object]:
    """Write a new file; what to tell of it."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    for part in parts:
        if os.getppid() != parent:
            raise SystemExit(1)
        digest.update(part)
        size += len(part)
        while part:
            part = part[os.write(descriptor, part) :]
    os.fsync(descriptor)
    os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _parts(header: bytes, memory: int, count: int) -> Iterator[memoryview]:
    yield memoryview(header)
    if count:
        values = memoryview(mmap.mmap(memory, count, access=mmap.ACCESS_READ))
        for first in range(0, count, _CHUNK):
            yield values[first : first + _CHUNK]


def main(path: str, memory: int, count: int, parent: int) -> None:
    ignore_stops()
    header = sys.stdin.buffer.read()
    try:
        told = write(path, _parts(header, memory, count), parent)
    except OSError as error:
        told = {"error": str(error)}
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
