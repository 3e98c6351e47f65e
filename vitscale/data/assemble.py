"""One micro-batch of one rank, put together: order -> bytes -> header -> box -> decoded region."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np

from vitscale import rng
from vitscale.data.batch import Batch, Replacement
from vitscale.data.crop import CenterCrop, RandomCrop
from vitscale.data.decode import Decoder, Job
from vitscale.data.header import BadSample, Header, read_header
from vitscale.data.index import ShardIndex
from vitscale.data.order import Order, SequentialOrder
from vitscale.data.shards import LARGEST_MEMBER, RawSample, Shards
from vitscale.errors import DataError

_CHUNK = 8  # samples that a thread takes at once
_LABEL = re.compile(rb"\s*(\d{1,18})\s*")


@dataclass(frozen=True, eq=False)
class Plan:
    """All that decides what one rank's micro-batches are: enough for a reader in another process."""

    index: ShardIndex
    order: Order | SequentialOrder
    crop: RandomCrop | CenterCrop
    decoder: str  # as choose_decoder says
    channels: int
    background: int
    max_pixels: int
    image_size: tuple[int, int] | None
    label: str
    needs_labels: bool
    num_labels: int | None
    seed: int
    global_batch: int
    micro_batch: int
    rank: int
    ranks: int
    first_batch: int
    threads: int
    prefetch: int
    table_samples: int

    def slots(self, number: int) -> tuple[int, int, int]:
        """Micro-batch `number` of this rank: its global batch, first slot, and the slot after its last."""
        share = self.global_batch // self.ranks
        step, part = divmod(number, share // self.micro_batch)
        first = self.rank * share + part * self.micro_batch
        return self.first_batch + step, first, first + self.micro_batch

    def position(self, number: int) -> tuple[int, str]:
        """Global sample count at micro-batch `number`, and the shard of its first sample: for messages."""
        batch, first, _ = self.slots(number)
        _, ids = self.order.refs(batch, first, first + 1)
        return batch * self.global_batch + first, self.index.names[int(ids[0]) >> 32]


class Memory(Protocol):
    """Where a micro-batch's pixels go."""

    def reserve(self, count: int) -> np.ndarray:
        """At least `count` bytes, uint8; what was written before is kept."""
        ...


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A sample whose header was read and found good."""

    raw: RawSample
    image: bytes
    header: Header
    label: int


class Assembler:
    """Makes micro-batches of a plan; several threads may ask for several at once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._shards = Shards(plan.index, plan.label, plan.table_samples)
        self._decoder = Decoder(plan.decoder, plan.channels, plan.background, plan.image_size)
        self._pool = ThreadPoolExecutor(plan.threads, thread_name_prefix="decode")

    def assemble(self, number: int, memory: Memory) -> Batch:
        """Micro-batch `number` of the rank, its pixels in `memory`. DataError for what cannot be replaced.

        Where an image lies in the memory depends on sizes alone, never on which thread was first.
        """
        plan = self._plan
        batch, first, last = plan.slots(number)
        epoch, ids = plan.order.refs(batch, first, last)
        samples = self._in_chunks(lambda chunk: [self._prepare(i) for i in chunk], ids.tolist())
        filled = _Filling(plan, epoch, ids, memory)
        jobs = filled.place(samples, range(len(ids)))
        failures = self._in_chunks(self._decoder.decode, jobs)
        bad = {i: sample for i, sample in enumerate(samples) if isinstance(sample, BadSample)}
        good = (i for i in range(len(ids)) if i not in bad)
        bad |= {i: failure for i, failure in zip(good, failures, strict=True) if failure is not None}
        replaced = [self._replace(filled, i, batch, first + i, bad[i]) for i in sorted(bad)]
        return filled.batch(tuple(replaced))

    def _in_chunks[T, R](self, work: Callable[[list[T]], list[R]], items: list[T]) -> list[R]:
        chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
        return list(chain.from_iterable(self._pool.map(work, chunks)))

    def _prepare(self, sample_id: int) -> _Prepared | BadSample:
        """A sample's bytes, label and header."""
        raw = self._shards.read(sample_id)
        try:
            if raw.image is None:
                raise BadSample("no_image", "no member with an image's extension")
            if raw.image_bytes > LARGEST_MEMBER:
                raise BadSample("too_large", f"{raw.image_bytes} bytes, more than {LARGEST_MEMBER}")
            return _Prepared(raw, raw.image, read_header(raw.image, self._plan.max_pixels), self._label(raw.label))
        except BadSample as bad:
            bad.sample = raw
            return bad

    def _label(self, data: bytes | None) -> int:
        """The label as a whole number; -1 where there is none and none is needed."""
        plan = self._plan
        match = _LABEL.fullmatch(data) if data is not None else None
        if match is None:
            if plan.needs_labels:
                raise BadSample("label", f"no .{plan.label} member" if data is None else f"{data[:20]!r} is no whole number")
            return -1
        label = int(match[1])
        if plan.needs_labels and plan.num_labels is not None and label >= plan.num_labels:
            raise BadSample("label", f"{label}, with model.num_labels={plan.num_labels}")
        return label
