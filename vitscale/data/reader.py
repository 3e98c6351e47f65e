"""The reader process of a rank: `python -m vitscale.data.reader RESULTS_FD PARENT_PID MEMORY_FD...`.

It reads ahead and decodes, with threads, and never imports torch. Standard input brings its Work, then the
number of each memory that is free to be filled; RESULTS_FD takes a message for each micro-batch, and signs
of life. It ignores the signals that stop a run (the ranks save and leave in their own time) and leaves when
its parent is gone.
"""

from __future__ import annotations

import faulthandler
import os
import select
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock

import numpy as np
from PIL import Image

from vitscale.data.assemble import Assembler, Plan
from vitscale.data.wire import FREE, Alive, Failed, Filled, Work, receive, send
from vitscale.errors import VitscaleError
from vitscale.files.retry import activity, retries
from vitscale.files.shared_memory import SharedMemory
from vitscale.heartbeat import STACKS
from vitscale.text import ignore_warnings_of_pillow
from vitscale.world import ignore_stops

_LIFE_EVERY_S = 0.25
_SWITCH_S = 0.0005  # a thread that has decoded waits so long for another one's Python, not 5 ms


class _Reader:
    """Fills memories as they become free: micro-batch n goes to memory n % prefetch."""

    def __init__(self, plan: Plan, first: list[int], memories: list[SharedMemory], results: int) -> None:
        self._memories, self._results = memories, results
        self._end = plan.micro_batches
        self._next = list(first)  # the micro-batch that each memory takes next
        self._active = -1  # so that the first sign comes at once
        self._assembler = Assembler(plan)
        self._pool = ThreadPoolExecutor(len(memories), thread_name_prefix="assemble")
        self._sending = Lock()
        self._told = 0  # of the reads that were made again

    def fill(self, memory: int) -> None:
        """Start on the next micro-batch of a memory."""
        number = self._next[memory]
        self._next[memory] += len(self._memories)
        if self._end is None or number < self._end:
            self._pool.submit(self._fill, number, self._memories[memory])

    def tell_life(self) -> None:
        """Send a sign of life if there was any: a reader that hangs sends none."""
        if self._active != activity.count:
            self._active = activity.count
            with self._sending:
                send(self._results, Alive())

    def _fill(self, number: int, memory: SharedMemory) -> None:
        message: Filled | Failed
        try:
            batch = self._assembler.assemble(number, memory)
            message = Filled(number, len(batch.pixels), replace(batch, pixels=np.zeros(0, dtype=np.uint8)))
            message = self._with_retries(message)
        except VitscaleError as error:
            message = Failed(number, error)
        except BaseException:
            message = Failed(number, None, traceback.format_exc())
        with self._sending:
            send(self._results, message)

    def _with_retries(self, message: Filled) -> Filled:
        with self._sending:
            count = int(retries)
            new, self._told = count - self._told, count
        return replace(message, batch=replace(message.batch, retries=new)) if new else message


def main(arguments: list[str]) -> None:
    results, parent, *descriptors = map(int, arguments)
    _quiet()
    sys.setswitchinterval(_SWITCH_S)
    ignore_stops()
    code = 1
    try:
        _serve(results, parent, [SharedMemory(descriptor) for descriptor in descriptors])
        code = 0
    except (EOFError, BrokenPipeError):
        code = 0  # the parent is gone
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # without waiting for threads in the middle of an image


def _serve(results: int, parent: int, memories: list[SharedMemory]) -> None:
    """Until the parent closes its end of standard input, or is no more."""
    work: Work = receive(0)
    plan: Plan = work.plan
    Image.MAX_IMAGE_PIXELS = plan.max_pixels
    ignore_warnings_of_pillow()
    try:
        reader = _Reader(plan, work.first, memories, results)
    except VitscaleError as error:
        send(results, Failed(0, error))
        return
    while os.getppid() == parent:
        reader.tell_life()
        if select.select([0], [], [], _LIFE_EVERY_S)[0]:
            message = os.read(0, FREE.size)
            if not message:
                return
            reader.fill(FREE.unpack(message)[0])


def _quiet() -> None:
    """Send what C libraries print (nvImageCodec, libtiff: a line for each bad image) nowhere; Python's own stays."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")  # as Python's own
    faulthandler.enable(sys.stderr)
    faulthandler.register(STACKS, sys.stderr)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


if __name__ == "__main__":
    main(sys.argv[1:])
