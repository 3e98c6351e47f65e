"""The rank's side of reading: starts the reader process, takes its micro-batches in order."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from vitscale.config import schema
from vitscale.data.assemble import Plan
from vitscale.data.batch import Batch
from vitscale.data.crop import Crop
from vitscale.data.index import ShardIndex, require_labels
from vitscale.data.labels import LabelReader
from vitscale.data.order import SampleOrder
from vitscale.data.wire import FREE, Alive, Failed, Filled, Work, receive, send
from vitscale.errors import InfrastructureError, StorageError
from vitscale.files.decode import choose_decoder
from vitscale.files.shared_memory import SharedMemory
from vitscale.heartbeat import STACKS, beat
from vitscale.text import to_stderr
from vitscale.world import World, start_helper

_BATCHES_AHEAD = 64  # time to scan a shard on a slow file system before its first sample is due
_STARTING_S = 60.0  # for a reader to be there
_REMEMBERED = 64  # batches: a memory that is four times what all of them needed is made smaller
_LEAVING_S = 5.0  # for a reader to leave by itself, and, once killed, to be gone
_MOST_RESTARTS = 3  # of a reader that dies, without a batch between them
# The reader has its own threads, and takes and frees an image's memory thousands of times a second: glibc is not
# to give each back to the kernel (measured: 30% of simplejpeg's time).
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


def fetched_ahead(order: SampleOrder, largest: int, global_batch: int, ranks: int) -> tuple[int, int]:
    """How many samples of a lane are ahead of a batch when the tables of their shards are fetched, and how many
    samples' tables a rank keeps. largest: samples of the largest shard."""
    share = global_batch // order.lanes  # of a lane in a batch
    ahead = max(order.block, share) + min(largest, _BATCHES_AHEAD * share)
    lanes = -(-order.lanes // ranks) + (order.lanes % ranks > 0)
    # A batch starts and what is ahead ends inside a block, and shards reach over both ends.
    return ahead, lanes * (3 * order.block + share + ahead + 2 * largest * order.sources)


class Loader:
    """An iterator over this rank's micro-batches, endless for an Order.

    A Batch is lent: its pixels are valid until `release`, which lets the reader use their memory again. At most
    `memories` may be out at once, and the first one out is to be the first one back. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        *,
        index: ShardIndex,
        order: SampleOrder,
        crop: Crop,
        data: schema.Data,
        num_channels: int,
        seed: int,
        world: World,
        global_batch: int,
        micro_batch: int,
        start: int,
        labels: LabelReader | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """start: global samples consumed, a multiple of global_batch.

        labels: how they are read; where they are required, rank 0 looks at once whether the first shard has any.
        image_size: (height, width) that boxes will be resized to; lets simplejpeg decode at a DCT scale.
        """
        assert start % global_batch == 0
        assert global_batch % (micro_batch * world.world_size) == 0
        labels = labels or LabelReader(path=data.label_path)
        if labels.required and world.is_main:
            require_labels(index, data.label_extension)
        ahead, table_samples = fetched_ahead(order, int(index.samples.max()), global_batch, world.world_size)
        self.decoder = choose_decoder(data.decode)  # what data.decode=auto has become, for the run's record
        self._plan = Plan(
            index=index, order=order, crop=crop, decoder=self.decoder, channels=num_channels,
            background=data.background, max_pixels=data.max_pixels, image_size=image_size,
            image_bytes=None if data.batch_bytes is None else data.batch_bytes // micro_batch,
            extension=data.label_extension, labels=labels, seed=seed, global_batch=global_batch,
            micro_batch=micro_batch, rank=world.rank, ranks=world.world_size, first_batch=start // global_batch,
            threads=data.threads or world.cores_per_rank, prefetch=data.prefetch,
            table_samples=table_samples, ahead=ahead,
        )  # fmt: skip
        self._number = 0  # of the micro-batch to give out next
        self._lent: dict[int, Batch] = {}  # what was given out and not released, by memory
        self._arrived: dict[int, Filled | Failed] = {}
        self._memories = [SharedMemory.create("batch") for _ in range(data.prefetch)]
        self._needed: deque[int] = deque(maxlen=_REMEMBERED)  # bytes, of the last batches
        self._next_fill = list(range(data.prefetch))  # the micro-batch that each memory is to have next
        self._filling: dict[int, int] = {}  # memory -> the micro-batch that the reader is at, or will be
        self._patience_s, self._restarts = data.patience_s, 0
        self._results, self._lives = -1, False  # the reader's messages; whether there was one
        self._start_reader()
        for memory in range(data.prefetch):
            self._free(memory)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def ready(self) -> bool:
        """Whether `next()` would not have to wait for the reader, be it for a batch, an error or the end."""
        while self._number not in self._arrived and self._number != self._plan.micro_batches:
            if not wait([self._results], 0):
                return False
            self._receive()
        return True

    def __next__(self) -> Batch:
        number, end = self._number, self._plan.micro_batches
        if end is not None and number >= end:
            raise StopIteration
        memory = number % len(self._memories)
        assert memory not in self._lent, "the batch that lies in this memory was never released"
        while number not in self._arrived:
            self._receive()
        message = self._arrived[number]
        if isinstance(message, Failed):
            if message.error is not None:
                raise message.error
            raise RuntimeError(f"the reader failed at {self._plan.where(number)}:\n{message.traceback}")
        del self._arrived[number]
        batch = replace(message.batch, pixels=self._memories[memory].view(message.bytes))
        self._number, self._lent[memory] = number + 1, batch
        return batch

    def release(self, batch: Batch) -> None:
        """The pixels of a batch are no longer needed."""
        memory = self._memory_of(batch)
        self._needed.append(len(batch.pixels))
        del self._lent[memory]
        del batch  # its pixels may be no more
        if len(self._needed) == _REMEMBERED and len(self._memories[memory].mapped) > 4 * max(self._needed):
            self._memories[memory].shrink(2 * max(self._needed))
        self._free(memory)

    @property
    def memories(self) -> int:
        """How many batches may be out at once."""
        return len(self._memories)

    def memory(self, batch: Batch) -> tuple[int, np.ndarray]:
        """Where the pixels of a lent batch lie: (which of the memories, uint8 [all of it] as mapped here).

        A memory that had to grow is another array from then on; the old one stays mapped while it is referenced.
        """
        memory = self._memory_of(batch)
        return memory, self._memories[memory].mapped

    def _memory_of(self, batch: Batch) -> int:
        memories = [memory for memory, lent in self._lent.items() if lent is batch]
        assert memories, "this batch is not out: it was released before, or is another loader's"
        return memories[0]

    def reader_memory(self) -> int:
        """The most memory that the reader process has had, in bytes, what it shares with this one included."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)  # not there once it has ended
        return 1024 * int(found[1]) if found else 0

    def close(self) -> None:
        """End the reader. Batches given out before stay readable."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self._close_reader()
        for memory in self._memories:
            memory.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _control(self) -> int:
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    def _free(self, memory: int) -> None:
        """Let the reader fill a memory with its next micro-batch."""
        self._filling[memory] = self._next_fill[memory]
        self._next_fill[memory] += len(self._memories)
        with contextlib.suppress(BrokenPipeError):  # seen, and mended, by `_receive`
            os.write(self._control, FREE.pack(memory))

    def _receive(self) -> None:
        """Take the reader's next message. One that died is started again at the same place; StorageError where it gives
        no sign of life for data.patience_s, InfrastructureError where it dies again and again."""
        limit = self._patience_s if self._lives else max(self._patience_s, _STARTING_S)
        if not wait([self._results], limit):
            raise self._stuck()
        try:
            message = receive(self._results)
        except EOFError:
            self._restart()
            return
        self._lives = True
        beat()
        if not isinstance(message, Alive):
            self._arrived[message.number] = message
            self._filling.pop(message.number % len(self._memories), None)
            self._restarts = 0

    def _restart(self) -> None:
        """Start another reader in place of one that died; what it has not filled is filled anew."""
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            raise self._died()
        to_stderr(f"rank {self._plan.rank}: the reader process died ({self._end()}) and is started again")
        self._close_reader()
        self._start_reader()
        with contextlib.suppress(BrokenPipeError):
            for memory in self._filling:
                os.write(self._control, FREE.pack(memory))

    def _start_reader(self) -> None:
        first = [self._filling.get(memory, following) for memory, following in enumerate(self._next_fill)]
        self._lives = False  # until its first message
        self._results, reader_end = os.pipe()
        try:
            self._process = self._reader_process(reader_end)
        finally:
            os.close(reader_end)
        with contextlib.suppress(BrokenPipeError):
            send(self._control, Work(self._plan, first))

    def _close_reader(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_LEAVING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            try:
                self._process.wait(_LEAVING_S)
            except subprocess.TimeoutExpired:  # the kernel ends it once its storage answers: no reason to wait here
                where = f"rank {self._plan.rank}: the reader process {self._process.pid}"
                to_stderr(f"{where} was killed and waits in the kernel for its storage (state D); it is left behind")
        os.close(self._results)

    def _reader_process(self, results: int) -> subprocess.Popen[bytes]:
        memories = [memory.descriptor for memory in self._memories]
        arguments = [str(number) for number in (results, os.getpid(), *memories)]
        return start_helper(
            "vitscale.data.reader", arguments, [results, *memories], _ENVIRONMENT, stdin=subprocess.PIPE, bufsize=0
        )

    def _end(self) -> str:
        """How the reader ended; it closes its pipe only by ending."""
        try:
            code = self._process.wait(_LEAVING_S)
        except subprocess.TimeoutExpired:
            return "without an exit code"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _died(self) -> InfrastructureError:
        return InfrastructureError(
            f"rank {self._plan.rank}: the reader process died ({self._end()}) at {self._plan.where(self._number)}, "
            f"{self._restarts} times; start the run again to go on from its newest checkpoint. Signal 9 is mostly the "
            "machine's memory limit: lower data.prefetch, train.micro_batch or data.max_pixels"
        )

    def _stuck(self) -> StorageError:
        """End a reader that hangs, after it has said where its threads stand."""
        for number in (signal.SIGCONT, STACKS):
            self._process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._process.kill()
        return StorageError(
            f"rank {self._plan.rank}: the reader process has read nothing for data.patience_s={self._patience_s:g}, at "
            f"{self._plan.where(self._number)}; where its threads stand is printed above; start the run again once its "
            "storage answers"
        )
