"""One micro-batch of one rank, put together: order -> bytes -> header -> box -> decoded region."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np

from vitscale.data.batch import Batch, Replacement
from vitscale.data.crop import Crop
from vitscale.data.index import ShardIndex
from vitscale.data.labels import Label, LabelReader
from vitscale.data.order import Refs, SampleOrder
from vitscale.data.shards import RawSample, Shards, header_of
from vitscale.errors import DataError
from vitscale.files.decode import Decoder, Job
from vitscale.files.header import BadSample, Header
from vitscale.files.retry import activity

_CHUNK = 16  # samples that a thread takes at once
_MOST_ENCODED = 64 << 20  # bytes of a micro-batch's files held at once, where they are larger
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Plan:
    """All that decides what one rank's micro-batches are: enough for a reader in another process."""

    index: ShardIndex
    order: SampleOrder
    crop: Crop
    decoder: str  # as choose_decoder says
    channels: int
    background: int
    max_pixels: int
    image_size: tuple[int, int] | None  # (height, width) that boxes are resized to, where known
    image_bytes: int | None  # of the pixels kept of an image at most
    extension: str  # of the members with labels
    labels: LabelReader
    seed: int
    global_batch: int
    micro_batch: int
    rank: int
    ranks: int
    first_batch: int
    threads: int
    prefetch: int
    table_samples: int  # whose places are kept: of the shards being read, and of those fetched ahead
    ahead: int  # samples of a lane whose shards' tables are fetched before they are needed

    def slots(self, number: int) -> tuple[int, int, int]:
        """Micro-batch `number` of this rank: its global batch, its first slot, the slot after its last."""
        share = self.global_batch // self.ranks
        step, part = divmod(number, share // self.micro_batch)
        first = self.rank * share + part * self.micro_batch
        return self.first_batch + step, first, first + self.micro_batch

    @property
    def micro_batches(self) -> int | None:
        """How many there are from the start on; None: without end."""
        if self.order.epochs is None:
            return None
        left = self.order.epochs * self.order.batches_per_epoch - self.first_batch
        return left * (self.global_batch // self.ranks // self.micro_batch)

    def where(self, number: int) -> str:
        """Where in the data micro-batch `number` starts, for messages."""
        batch, first, _ = self.slots(number)
        refs = self.order.refs(batch, first, first + 1)
        shard = self.index.names[int(refs.ids[0]) >> 32]
        return f"sample {batch * self.global_batch + first} of the order (epoch {refs.epochs[0]}, shard {shard})"


class Memory(Protocol):
    """Where a micro-batch's pixels go."""

    def reserve(self, count: int) -> np.ndarray:
        """uint8 [at least count]; what was written before is kept."""
        ...


@dataclass(frozen=True, eq=False)
class _Sample:
    """A sample as read: with a good header, or with what is bad about it."""

    raw: RawSample
    header: Header | None
    label: Label
    bad: BadSample | None = None


class Assembler:
    """Makes micro-batches of a plan; several threads may ask for several at once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._shards = Shards(plan.index, plan.extension, plan.table_samples)
        self._decoder = Decoder(plan.decoder, plan.channels, plan.background, plan.image_size, plan.image_bytes)
        self._pool = ThreadPoolExecutor(plan.threads, thread_name_prefix="decode")

    def assemble(self, number: int, memory: Memory) -> Batch:
        """Micro-batch `number` of the rank, its pixels in `memory`. DataError for what cannot be replaced.

        Where an image lies in the memory depends on sizes alone, never on which thread was first.
        """
        batch, first, last = self._plan.slots(number)
        self._shards.fetch(self._plan.order.shards_ahead(batch, first, last, self._plan.ahead).tolist())
        refs = self._plan.order.refs(batch, first, last)
        filling = _Filling(self._plan, self._decoder, refs.repeats, memory)
        replaced = []
        for places in self._together(refs):
            replaced += self._fill(filling, places, refs[places], first)
        for each in replaced:
            others = self._plan.order.candidates(batch, each.slot)
            self._replace(filling, each.slot - first, others, each)
        return filling.batch(tuple(replaced), self._plan.order.epoch(batch))

    def _together(self, refs: Refs) -> Iterator[list[int]]:
        """The places of a micro-batch in runs whose encoded bytes are held at once: all of it, but of huge images."""
        sizes = self._shards.sizes(refs.ids.tolist())
        start, held = 0, 0
        for place, size in enumerate(sizes):
            if held and held + size > _MOST_ENCODED:
                yield list(range(start, place))
                start, held = place, 0
            held += size
        yield list(range(start, len(sizes)))

    def _fill(self, filling: _Filling, places: list[int], refs: Refs, first: int) -> list[Replacement]:
        """Read and decode what belongs to some places; those that are to be replaced, and why."""
        samples = self._in_chunks(lambda chunk: [self._read(sample_id) for sample_id in chunk], refs.ids.tolist())
        bad = {i: sample.bad for i, sample in enumerate(samples) if sample.bad is not None}
        good = [i for i in range(len(samples)) if i not in bad]
        jobs = filling.place([places[i] for i in good], refs[good], [samples[i] for i in good])
        failures = self._in_chunks(self._decode, jobs)
        bad |= {i: failure for i, failure in zip(good, failures, strict=True) if failure is not None}
        return [
            Replacement(first + places[i], samples[i].raw.shard, samples[i].raw.key, why.cause, why.reason)
            for i, why in sorted(bad.items())
        ]

    def _decode(self, jobs: list[Job]) -> list[BadSample | None]:
        activity.count += 1
        return self._decoder.decode(jobs)

    def _in_chunks(self, work: Callable[[list[Item]], list[Result]], items: list[Item]) -> list[Result]:
        chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
        return list(chain.from_iterable(self._pool.map(work, chunks)))

    def _replace(self, filling: _Filling, place: int, others: Refs, bad: Replacement) -> None:
        """Fill the place of a bad sample with the first readable one of `others`."""
        for i, sample_id in enumerate(others.ids.tolist()):
            sample = self._read(sample_id)
            if sample.bad is None and self._decoder.decode(filling.place([place], others[[i]], [sample])) == [None]:
                return
        raise DataError(
            f"{bad.shard}/{bad.key}: {bad.cause}: {bad.reason}; nor is any of the {len(others)} samples tried in its "
            "place readable: look at the shard, and at data.decode, data.label and data.max_pixels"
        )

    def _read(self, sample_id: int) -> _Sample:
        """A sample's bytes, header and label."""
        raw = self._shards.read(sample_id)
        try:
            return _Sample(raw, header_of(raw, self._plan.max_pixels), self._plan.labels.read(raw.label))
        except BadSample as bad:
            return _Sample(raw, None, -1, bad)


class _Filling:
    """A micro-batch while its places are filled."""

    def __init__(self, plan: Plan, decoder: Decoder, repeats: np.ndarray, memory: Memory) -> None:
        """repeats: of the samples that belong here, whatever stands for a bad one."""
        count = len(repeats)
        self._plan = plan
        self._decoder = decoder
        self._memory = memory
        self._used = 0  # bytes
        self._offsets = np.zeros(count, dtype=np.int64)
        width = plan.labels.width
        self._labels = np.zeros(count, np.int64) if width is None else np.zeros((count, width), np.float32)
        self._epochs = np.zeros(count, dtype=np.int64)
        self._repeats = repeats.astype(np.int64)
        self._ids = np.zeros(count, dtype=np.int64)
        self._keys = np.zeros(count, dtype=np.int64)
        self._shapes = np.zeros((count, 2), dtype=np.int32)
        self._boxes = np.zeros((count, 4), dtype=np.float32)
        self._names = [""] * count

    def place(self, at: list[int], refs: Refs, samples: Sequence[_Sample]) -> list[Job]:
        """Draw the boxes of good samples, give each its room in the memory, and say what is to be decoded.

        at: the place in the micro-batch of each; refs: what each is.
        """
        plan, keys = self._plan, refs.keys(self._plan.seed)
        headers = [sample.header for sample in samples if sample.header is not None]
        sizes = np.array([header.oriented for header in headers], dtype=np.int64).reshape(-1, 2)
        drawn = plan.crop.boxes(keys, sizes[:, 0], sizes[:, 1]).tolist()
        regions = [self._decoder.region(header, tuple(box)) for header, box in zip(headers, drawn, strict=True)]
        shapes = np.array([region.shape for region in regions], dtype=np.int64).reshape(-1, 2)
        ends = self._used + np.cumsum(shapes.prod(axis=1) * plan.channels)
        starts = np.concatenate([[self._used], ends])[:-1]
        self._used = int(ends[-1]) if at else self._used
        self._offsets[at] = starts
        self._shapes[at] = shapes
        self._epochs[at] = refs.epochs
        self._ids[at] = refs.ids
        self._keys[at] = keys
        self._boxes[at] = np.array([region.box for region in regions]).reshape(-1, 4)
        if at:
            self._labels[at] = [sample.label for sample in samples]
        for place, sample in zip(at, samples, strict=True):
            self._names[place] = f"{sample.raw.shard}/{sample.raw.key}"
        pixels = self._memory.reserve(self._used)
        rooms = [pixels[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return [
            Job(sample.raw.image or b"", header, region, room.reshape(*region.shape, plan.channels))
            for sample, header, region, room in zip(samples, headers, regions, rooms, strict=True)
        ]

    def batch(self, replaced: tuple[Replacement, ...], epoch: int) -> Batch:
        return Batch(
            pixels=self._memory.reserve(self._used)[: self._used],
            offsets=self._offsets,
            heights=self._shapes[:, 0].copy(),
            widths=self._shapes[:, 1].copy(),
            channels=self._plan.channels,
            boxes=self._boxes,
            labels=self._labels,
            sample_ids=self._ids,
            sample_keys=self._keys,
            names=tuple(self._names),
            repeats=self._repeats,
            epochs=self._epochs,
            replaced=replaced,
            epoch=epoch,
        )
