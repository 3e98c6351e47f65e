"""Signs of life of a rank, for the supervisor of its node (launch/watchdog.py): a few words of mapped memory.

The training loop says what it is in, by main thread alone; that costs a write to memory, and no system call. A rank
that nobody supervises writes the same, to nobody.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STACKS = signal.SIGUSR2  # a rank, or a reader, that gets it prints where all its threads stand
PULSE_BYTES = 48
_NAME = slice(32, PULSE_BYTES)  # of the phase, after four words
_PID, _BEATS, _PROGRESS, _STEP = range(4)


@dataclass(frozen=True)
class Pulse:
    """What a rank has last said of itself."""

    rank: int
    pid: int
    beats: int  # of any kind; one that stays the same is no sign of life
    progress: int  # phases begun: the same on all ranks where they are at the same place
    step: int  # the last one that is done
    phase: str

    @staticmethod
    def read(path: Path) -> Pulse:
        return Pulse.of(int(path.stem), path.read_bytes())

    @staticmethod
    def of(rank: int, content: bytes) -> Pulse:
        """What the file of a rank has."""
        words = memoryview(content[: _NAME.start]).cast("q")
        phase = content[_NAME].decode("ascii").strip("\0")
        return Pulse(rank, words[_PID], words[_BEATS], words[_PROGRESS], words[_STEP], phase)


_bytes = memoryview(bytearray(PULSE_BYTES))
_words = _bytes[: _NAME.start].cast("q")
_phase = ""


def start(folder: str | None, rank: int) -> None:
    """Write into `folder` from now on, where the supervisor made one, and answer STACKS there or on standard error."""
    global _bytes, _words
    if folder is None or not os.path.isdir(folder):  # of another run, and inherited with its environment
        if sys.__stderr__ is not None:  # None: closed
            faulthandler.register(STACKS, sys.__stderr__)
        return
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    stacks = os.open(os.path.join(folder, f"{rank}.stacks"), flags, 0o600)
    faulthandler.register(STACKS, stacks)
    path = os.path.join(folder, f"{rank}.pulse")
    with open(f"{path}.tmp", "w+b") as file:
        file.truncate(PULSE_BYTES)
        _bytes = memoryview(mmap.mmap(file.fileno(), PULSE_BYTES))
    _words = _bytes[: _NAME.start].cast("q")
    _words[_PID] = os.getpid()
    enter("start")
    os.rename(f"{path}.tmp", path)  # whoever finds it may send STACKS


def beat() -> None:
    """This rank lives, and is where it was."""
    _words[_BEATS] += 1


def advance() -> None:
    """This rank is at the next place, as all ranks will be."""
    _words[_BEATS] += 1
    _words[_PROGRESS] += 1


def enter(phase: str) -> None:
    """This rank is now in `phase` (at most 16 letters); launch/watchdog.py has how long each may last."""
    global _phase
    _phase = phase
    _bytes[_NAME] = _padded(phase)
    advance()


def stepped(step: int) -> None:
    """A step is done. From the first one on, nothing is to take long."""
    _words[_STEP] = step
    enter("step")


@functools.cache
def _padded(phase: str) -> bytes:
    return phase.encode("ascii").ljust(16, b"\0")


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """This rank is in `name` for as long as the context lasts, then again in what it was in."""
    before = _phase
    enter(name)
    try:
        yield
    finally:
        enter(before)
