"""A sample's bytes by its id: its shard's table, kept while in use, then one read."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from vitscale.data.index import ShardIndex
from vitscale.data.table import SampleTable
from vitscale.errors import DataError
from vitscale.files.cache import LruCache
from vitscale.files.header import BadSample, Header, read_header
from vitscale.files.retry import unreadable
from vitscale.files.tar import LARGEST_MEMBER

_LARGEST_LABEL = 16 << 20  # bytes; a longer one is none
_FETCHING = 8  # tables at once


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in its shard."""

    shard: str
    key: str
    image: bytes | None  # None: no image member
    image_bytes: int  # 0 where there is none; above LARGEST_MEMBER, `image` is empty
    label: bytes | None


def header_of(raw: RawSample, max_pixels: int) -> Header:
    """BadSample for what cannot be an image."""
    if raw.image is None:
        raise BadSample("no_image", "no member is an image")
    if raw.image_bytes > LARGEST_MEMBER:
        raise BadSample("too_large", f"{raw.image_bytes} bytes, more than {LARGEST_MEMBER}")
    return read_header(raw.image, max_pixels)


class Shards:
    """Reads samples of an index by id. For many threads at once."""

    def __init__(self, index: ShardIndex, label: str, table_samples: int) -> None:
        """label: extension of the member with the label; table_samples: how many samples' tables are kept."""
        self._index, self._label = index, label
        self._tables: LruCache[int, SampleTable] = LruCache(self._table, table_samples, len)
        self._ahead: frozenset[int] = frozenset()
        self._ahead_changes = Lock()
        self._fetching = ThreadPoolExecutor(_FETCHING, thread_name_prefix="tables")

    def fetch(self, shards: Iterable[int]) -> None:
        """In the background, fetch the tables of the shards to come, unless the call before asked for them too.

        A table that cannot be fetched is an error only for the `read` that needs it.
        """
        with self._ahead_changes:
            before, upcoming = self._ahead, list(shards)
            self._ahead = frozenset(upcoming)
            for shard in upcoming:
                if shard not in before:
                    self._fetching.submit(self._tables.get, shard)

    def sizes(self, sample_ids: Iterable[int]) -> list[int]:
        """Bytes of the encoded image of each sample."""
        return [int(self._tables.get(each >> 32).image_bytes[each & 0xFFFFFFFF]) for each in sample_ids]

    def read(self, sample_id: int) -> RawSample:
        """DataError where the shard is not (or no longer) what the index says."""
        shard, place = sample_id >> 32, sample_id & 0xFFFFFFFF
        table = self._tables.get(shard)
        name, key, label = self._index.names[shard], table.key(place), table.label_text(place)
        if label is None and 0 <= table.label_bytes[place] <= _LARGEST_LABEL:  # too long to lie in the table
            label = self._bytes(shard, int(table.label_offset[place]), int(table.label_bytes[place]))
        if table.image_kind[place] < 0:
            return RawSample(name, key, None, 0, label)
        size = int(table.image_bytes[place])
        data = self._bytes(shard, int(table.image_offset[place]), size) if size <= LARGEST_MEMBER else b""
        return RawSample(name, key, data, size, label)

    def _bytes(self, shard: int, offset: int, count: int) -> bytes:
        path = self._index.paths[shard]
        try:
            data = self._index.store.read(path, offset, count)
        except OSError as error:
            raise unreadable(path, error, f" at byte {offset}") from None
        if len(data) != count:
            raise DataError(f"{path}: ends at byte {offset + len(data)}, inside a member: it was cut while in use")
        return data

    def _table(self, shard: int) -> SampleTable:
        path = self._index.paths[shard]
        table = self._index.table(shard, self._label)
        try:
            self._index.store.fetch(path, self._index.sha256[shard])
        except OSError as error:
            raise unreadable(path, error) from None
        return table
