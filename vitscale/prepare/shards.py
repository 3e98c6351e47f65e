"""Shards as what `vitscale pack` makes shards of: all members of a sample are kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from vitscale.data.index_builder import stat_all
from vitscale.data.parallel import on_shards
from vitscale.data.sidecar import Shard
from vitscale.errors import DataError
from vitscale.files.classes import class_names
from vitscale.files.retry import unreadable
from vitscale.files.store import FileStat
from vitscale.files.stores import Stores
from vitscale.files.tar import OffsetTable, scan_shard
from vitscale.prepare.sources import Found, Keys
from vitscale.prepare.writer import Members, PackedSample


@dataclass(frozen=True, slots=True)
class TarMembers:
    """The members of a sample in a shard."""

    path: str
    image: str  # the extension of its image; "": it has none
    members: tuple[tuple[str, int, int], ...]  # extension, offset, bytes

    def read(self) -> tuple[str, Members]:
        store = shard_store()
        found = {}
        for extension, offset, size in self.members:
            try:
                found[extension] = store.read(self.path, offset, size)
            except OSError as error:
                raise unreadable(self.path, error, f" at byte {offset}") from None
            if len(found[extension]) != size:
                raise DataError(f"{self.path}: was cut while it was read")
        return self.image, found


def shard_store() -> Stores:
    """What reads shards in this process; connections are not shared with one that is forked."""
    return _store_of(os.getpid())


@lru_cache(maxsize=1)
def _store_of(process: int) -> Stores:
    return Stores()


def from_shards(paths: Sequence[str], classes: Sequence[str] | None) -> Found:
    """The samples of shards, all their members kept."""
    keys, samples, passed_over = Keys(), [], 0
    stats = stat_all(shard_store(), paths).T.tolist()
    shards = [Shard(path, FileStat(*stat)) for path, stat in zip(paths, stats, strict=True)]
    for path, table in zip(paths, on_shards(_scanned, shards, "pack: looking"), strict=True):
        passed_over += table.passed_over
        for place, key in enumerate(table.keys):
            members, image = table.members(place), table.image_of(place)
            name = next((extension for extension, at in members.items() if at == image), "")
            size = sum(size for _, size in members.values())
            origin = TarMembers(path, name, tuple((extension, *at) for extension, at in members.items()))
            samples.append(PackedSample(keys.once(key), origin, size))
    notes = [f"{passed_over} members that belong to no sample are left out"] if passed_over else []
    return Found(samples, classes or class_names(paths, shard_store(), one_meaning=True) or (), notes)


def _scanned(shard: Shard) -> OffsetTable:
    return scan_shard(shard.path, shard_store(), stat=shard.stat)
