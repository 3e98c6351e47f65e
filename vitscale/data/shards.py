"""A sample's bytes by its position: local shards read with pread, their tables and files kept while in use."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from vitscale.data.index import ShardIndex
from vitscale.data.tar import OffsetTable, scan_shard
from vitscale.errors import DataError

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")
LARGEST_MEMBER = 256 << 20  # bytes; a larger image is a bad sample, not read
_OPEN_FILES = 128
Value = TypeVar("Value")


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in its shard."""

    shard: str
    key: str
    image: bytes | None  # None: no image member
    image_bytes: int  # 0 where there is none; above LARGEST_MEMBER, `image` is empty
    label: bytes | None


class Shards:
    """Reads samples of an index by id. For many threads at once."""

    def __init__(self, index: ShardIndex, label: str, table_samples: int) -> None:
        """label: extension of the member with the label; table_samples: how many samples' places are kept."""
        self._index, self._label = index, label
        self._tables = _Recent(self._scan, table_samples, len)
        self._files = _Recent(self._open, _OPEN_FILES, lambda _: 1)

    def read(self, sample_id: int) -> RawSample:
        """DataError where the shard is not (or no longer) what the index says."""
        shard, place = sample_id >> 32, sample_id & 0xFFFFFFFF
        table = self._tables.get(shard)
        members = table.members(place)
        name = self._index.names[shard]
        label = members.get(self._label)
        label_bytes = self._bytes(shard, *label) if label and label[1] <= 64 else None
        image = next((member for kind, member in members.items() if kind in IMAGE_KINDS), None)
        if image is None:
            return RawSample(name, table.keys[place], None, 0, label_bytes)
        data = self._bytes(shard, *image) if image[1] <= LARGEST_MEMBER else b""
        return RawSample(name, table.keys[place], data, image[1], label_bytes)

    def _bytes(self, shard: int, offset: int, count: int) -> bytes:
        path = self._index.paths[shard]
        try:
            file = self._files.get(shard)  # held until it is read: another thread may let go of it
            data = b""
            while len(data) < count and (part := os.pread(file.descriptor, count - len(data), offset + len(data))):
                data += part
        except OSError as error:
            raise DataError(f"{path}: cannot be read at byte {offset}: {error.strerror}") from None
        if len(data) != count:
            raise DataError(f"{path}: ends at byte {offset + len(data)}, inside a member: it was cut while in use")
        return data

    def _scan(self, shard: int) -> OffsetTable:
        return indexed_table(self._index, shard)

    def _open(self, shard: int) -> _File:
        return _File(self._index.paths[shard])


def indexed_table(index: ShardIndex, shard: int) -> OffsetTable:
    """The offset table of an index's shard, which must still be what the index says."""
    path = Path(index.paths[shard])
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; the index names it") from None
    if size != index.bytes[shard]:
        raise DataError(
            f"{path}: has {size} bytes, the index says {index.bytes[shard]}: it was written again or cut; "
            "make a new index (vitscale index) for a new run, or bring the old shard back"
        )
    table = scan_shard(str(path))
    if len(table) != index.samples[shard]:
        raise DataError(
            f"{path}: holds {len(table)} samples, the index says {index.samples[shard]}; "
            "make a new index (vitscale index) for a new run, or bring the old shard back"
        )
    return table


class _File:
    """An open file that closes when the last thread lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Recent(Generic[Value]):
    """The values most recently asked for, up to a total weight; each made once, by the first that asks."""

    def __init__(self, make: Callable[[int], Value], capacity: int, weigh: Callable[[Value], int]) -> None:
        self._make, self._capacity, self._weigh = make, capacity, weigh
        self._lock = Lock()
        self._kept: OrderedDict[int, Future[Value]] = OrderedDict()
        self._weight = 0

    def get(self, key: int) -> Value:
        with self._lock:
            future = self._kept.get(key)
            is_first = future is None
            if future is None:
                future = self._kept[key] = Future()
            self._kept.move_to_end(key)
        if is_first:
            self._fill(key, future)
        return future.result()

    def _fill(self, key: int, future: Future[Value]) -> None:
        try:
            future.set_result(self._make(key))
        except BaseException as error:
            with self._lock:
                del self._kept[key]
            future.set_exception(error)
            return
        with self._lock:
            self._weight += self._weigh(future.result())
            for old in list(self._kept):
                if self._weight <= self._capacity:
                    break
                if old != key and self._kept[old].done():
                    self._weight -= self._weigh(self._kept.pop(old).result())
