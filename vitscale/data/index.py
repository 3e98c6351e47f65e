"""What a data set consists of: a row a shard, from an index file or by counting the shards' samples."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vitscale.config.schema import Data, Source
from vitscale.data.index_builder import IndexBuilder, stat_all
from vitscale.data.index_file import Rows, read_rows, write_rows
from vitscale.data.parallel import Report, report
from vitscale.data.patterns import expand, expand_among
from vitscale.data.sidecar import Shard, Sidecar, count_samples
from vitscale.data.table import SampleTable
from vitscale.errors import DataError
from vitscale.files.classes import class_names
from vitscale.files.retry import unreadable
from vitscale.files.store import FileStat, LocalFiles, Store, absolute, is_remote
from vitscale.files.stores import Stores

Packed = bytes
_SENT = 1000  # shards, packed at once


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The shards of a data set, in order; a sample id is shard << 32 | place in the shard."""

    paths: tuple[str, ...]
    names: tuple[str, ...]  # file name without .tar, with folders before it where two would be the same
    samples: np.ndarray  # int64 [shards]
    bytes: np.ndarray  # int64 [shards]
    sha256: tuple[str | None, ...]
    modified: np.ndarray  # int64 [shards], nanoseconds; tells a stale row
    store: Store = field(default_factory=Stores)
    fallback_folders: tuple[str, ...] = ()  # for the tables of shards whose own folder cannot be written
    image: str | None = None  # the extension of the members with images: data.image
    sources: tuple[int, ...] = ()  # how many shards each entry of data.train stands for, in their order

    @staticmethod
    def of(rows: Rows, store: Store, fallback_folders: tuple[str, ...] = (), image: str | None = None) -> ShardIndex:
        paths = tuple(rows.paths)
        return ShardIndex(
            paths=paths,
            names=tuple(_names(paths)),
            samples=rows.samples,
            bytes=rows.bytes,
            sha256=tuple(rows.sha256),
            modified=rows.modified,
            store=store,
            fallback_folders=fallback_folders,
            image=image,
        )

    @property
    def total(self) -> int:
        return int(self.samples.sum())

    @property
    def rows(self) -> Rows:
        return Rows(self.paths, self.samples, self.bytes, self.sha256, self.modified)

    def by_sources(self, sources: Sequence[Source]) -> ShardIndex:
        """The shards that the entries of data.train name, in their order, told by their paths: they need not be there.
        DataError for one that the index does not have, or that is named twice."""
        places = {absolute(path): place for place, path in enumerate(self.paths)}
        parts = [expand_among(source, list(places), "data.train") for source in sources]
        chosen: dict[str, int] = {}
        for path in (absolute(path) for part in parts for path in part):
            if path not in places:
                raise DataError(
                    f"data.index: has no row for {path}; make it again of all patterns with `vitscale index`"
                )
            if path in chosen:
                raise DataError(f"{path}: is named twice by data.train; name each shard once")
            chosen[path] = places[path]
        at = list(chosen.values())
        paths, sha256 = [self.paths[place] for place in at], [self.sha256[place] for place in at]
        rows = Rows(paths, self.samples[at], self.bytes[at], sha256, self.modified[at])
        index = ShardIndex.of(rows, self.store, self.fallback_folders, self.image)
        return replace(index, sources=tuple(len(part) for part in parts))

    @cached_property
    def class_names(self) -> list[str] | None:
        """By label, as classes.json beside the shards has them; None where there is none."""
        return class_names(self.paths, self.store)

    @cached_property
    def digest(self) -> str:
        """Hex digest of names, samples and bytes: equal wherever the shards lie, other when one changed."""
        digest = hashlib.sha256()
        for name, samples, size in zip(self.names, self.samples.tolist(), self.bytes.tolist(), strict=True):
            digest.update(f"{name} {samples} {size}\n".encode())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write JSON that `load` reads; shards at or below its folder are named relative to it."""
        write_rows(LocalFiles(), str(path), self.rows)

    @staticmethod
    def load(path: Path | str, store: Store | None = None) -> ShardIndex:
        """DataError for what is no index of ours."""
        store = store or Stores()
        parts = list(read_rows(store, str(path)))
        rows = Rows(
            [shard for part in parts for shard in part.paths],
            _joined(part.samples for part in parts),
            _joined(part.bytes for part in parts),
            [digest for part in parts for digest in part.sha256],
            _joined(part.modified for part in parts),
        )
        return ShardIndex.of(rows, store, _local_folder(str(path)))

    def to_bytes(self) -> Packed:
        """The index for other ranks, which `from_bytes` reads."""
        columns = np.stack([self.samples, self.bytes, self.modified]).astype("<i8")
        packer = zlib.compressobj(1)
        parts = [
            packer.compress(_line([len(self.paths), self.fallback_folders, self.image, self.sources])),
            packer.compress(columns.tobytes()),
        ]
        for start in range(0, len(self.paths), _SENT):
            some = slice(start, start + _SENT)
            parts.append(packer.compress(_line([self.paths[some], self.sha256[some]])))
        content = b"".join([*parts, packer.flush()])
        return hashlib.sha256(content).digest() + content

    @staticmethod
    def from_bytes(data: Packed, store: Store | None = None) -> ShardIndex:
        """What `to_bytes` gave, with nothing looked up. DataError where the bytes are not what they were."""
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise DataError("the index of the shards came damaged from rank 0; start the run again")
        content = io.BytesIO(zlib.decompress(memoryview(data)[32:]))
        count, fallbacks, image, sources = json.loads(content.readline())
        samples, size, modified = np.frombuffer(content.read(count * 24), "<i8").reshape(3, -1).astype(np.int64)
        paths: list[str] = []
        sha256: list[str | None] = []
        for line in content:
            some_paths, some_sha256 = json.loads(line)
            paths += some_paths
            sha256 += some_sha256
        rows = Rows(paths, samples, size, sha256, modified)
        index = ShardIndex.of(rows, store or Stores(), tuple(fallbacks), image)
        return replace(index, sources=tuple(sources))

    def table(self, shard: int, label: str) -> SampleTable:
        """The table of a shard, with the labels of extension `label`. DataError where it is not what the index says."""
        path = self.paths[shard]
        try:
            stat = self.store.stat(path)
        except OSError as error:
            raise unreadable(path, error) from None
        return Sidecar(self.store, label, self.fallback_folders, self.image).table(self._checked(shard, stat))

    def complete_tables(self, label: str, say: Report = report) -> None:
        """Make the tables that are missing, in parallel: for a job that needs every row before its first step.

        `say` gets a line every few seconds. DataError where a shard does not hold what the index says.
        """
        stats = stat_all(self.store, self.paths).T.tolist()
        shards = [self._checked(shard, FileStat(*stat)) for shard, stat in enumerate(stats)]
        count_samples(Sidecar(self.store, label, self.fallback_folders, self.image), shards, say)

    def _checked(self, shard: int, stat: FileStat) -> Shard:
        """A shard as it is now, which must be what was counted."""
        path, size = self.paths[shard], int(self.bytes[shard])
        if stat.bytes != size:
            raise DataError(
                f"{path}: has {stat.bytes} bytes, the index says {size}: it was written again or cut; "
                "make a new index (vitscale index) for a new run, or bring the old shard back"
            )
        return Shard(path, stat, int(self.samples[shard]))


def store_of(data: Data) -> Stores:
    """What reads the shards of a run."""
    return Stores(data.cache, data.cache_bytes, data.patience_s)


def unused_cache(data: Data, paths: Sequence[str]) -> str | None:
    """A line where data.cache holds none, or not all, of a run's shards, which who set it may not know."""
    local = sum(not is_remote(path) for path in paths)
    if data.cache is None or not local:
        return None
    those = "the shards" if local == len(paths) else f"{local} of the {len(paths)} shards"
    return (
        f"data.cache={data.cache}: is for shards at URLs, and not used for {those} of data.train, which are paths: "
        "they are read where they lie, also on a network file system"
    )


def open_index(
    sources: tuple[Source, ...],
    index_path: str | None,
    cache: Path,
    *,
    label: str = "cls",
    image: str | None = None,
    store: Store | None = None,
    key: str = "data.train",
) -> ShardIndex:
    """The index of the shards that `sources`, the value of `key`, name. Each is asked for its size and time once.

    From the file `index_path` (data.index) if given; else from index.json beside the shards where its rows are
    not stale, and the rest by a scan, kept beside the shards or, where that cannot be written, in the folder
    `cache`. A scan leaves the shards' tables, with labels of the extension `label` and images of the extension `image`
    (None: see scan_shard). DataError names the pattern, the shard or the file at fault.
    """
    store = store or Stores()
    parts = [expand([source], store, key) for source in sources] or [expand((), store, key)]
    builder = IndexBuilder([path for part in parts for path in part], store, key)
    fallbacks: tuple[str, ...] = (os.path.abspath(cache),)
    if index_path is not None:
        builder.take_from_file(index_path)
        fallbacks = (*_local_folder(index_path), *fallbacks)
    else:
        builder.take_from_folders(Sidecar(store, label, fallbacks, image), fallbacks[0])
    index = ShardIndex.of(builder.rows, store, fallbacks, image)
    return replace(index, sources=tuple(len(part) for part in parts))


def build_index(
    paths: Sequence[str],
    sha256: Sequence[str] | None = None,
    *,
    label: str = "cls",
    image: str | None = None,
    fallback_folders: tuple[str, ...] = (),
    store: Store | None = None,
    workers: int | None = None,
) -> ShardIndex:
    """Count every shard by its table and take its sha256 from there. A shard whose table is not there, or lacks its
    sha256 where none are given, is read once from end to end, which leaves the table: what is stopped goes on there.

    workers: processes; None: see on_shards.
    """
    builder = IndexBuilder(paths, store or Stores())
    if sha256 is not None:
        builder.sha256[:] = sha256
    sidecar = Sidecar(builder.store, label, fallback_folders, image, with_sha256=True)
    builder.count(range(len(paths)), sidecar, workers)
    return ShardIndex.of(builder.rows, builder.store, fallback_folders, image)


def require_images(index: ShardIndex, label: str) -> None:
    """DataError when no sample of the first shard has an image: at the start, not at the first batch."""
    table = index.table(0, label)
    if len(table) and not (table.image_kind >= 0).any():
        what = f"has the extension data.image={index.image!r}" if index.image else "is an image"
        raise DataError(
            f"{index.paths[0]}: no member {what} (it has {', '.join(sorted(table.extensions))}): set data.image to the "
            "extension of the images"
        )


def require_labels(index: ShardIndex, label: str) -> None:
    """DataError when no sample of the first shard has a label, and where a label means two classes: at the start, not
    after an hour."""
    class_names(index.paths, index.store, one_meaning=True)
    table = index.table(0, label)
    if label not in table.extensions:
        kinds = ", ".join(sorted(table.extensions))
        raise DataError(
            f"{index.paths[0]}: no member has the extension data.label={label!r} (it has {kinds}), and the objective "
            "needs labels: set data.label to the extension that holds a whole number, or pack from one folder a class"
        )


def _local_folder(path: str) -> tuple[str, ...]:
    """Where tables can lie beside an index; nowhere beside one at a URL."""
    return () if is_remote(path) else (os.path.dirname(os.path.abspath(path)),)


def _line(content: Any) -> Packed:
    """As one line of JSON, with surrogates escaped: any path goes through."""
    return json.dumps(content).encode() + b"\n"


def _joined(columns: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *columns])


def _names(paths: Sequence[str]) -> list[str]:
    """File names without .tar; where two are the same, all with their folders below the common one.

    Bytes that are no UTF-8 are written as \\udc80 to \\udcff: names go into files of text.
    """
    names = [path[path.rfind("/") + 1 :].removesuffix(".tar") for path in paths]
    if len(set(names)) < len(names):
        parts = [absolute(path).split("/") for path in paths]
        levels = enumerate(zip(*(each[:-1] for each in parts), strict=False))
        above = next((level for level, names in levels if len(set(names)) > 1), min(map(len, parts)) - 1)
        names = ["/".join(each[above:]).removesuffix(".tar") for each in parts]
    text = "\0".join(names)
    return names if text.isascii() else text.encode(errors="backslashreplace").decode().split("\0")
