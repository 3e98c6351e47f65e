"""Features in shards of .npy or parquet, in a folder that an interrupted command can go on with.

A shard is features-00000.npy (or .parquet), written row by row under another name and renamed when whole, and then
features-00000.names.json: `names`, the images in the order of its rows, and `skipped`, those that were bad, each
with its place in the input. A shard that has its names is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitscale.errors import CheckpointError, ConfigError, DataError
from vitscale.files.atomic import put_in_place, write_atomically
from vitscale.files.model_folder import read_json
from vitscale.inference.images import Entry, ImageBatch, ImageSource
from vitscale.inference.progress import Tally

MANIFEST = "features.json"
VERSION = "vitscale-features-1"


@dataclass(frozen=True)
class Request:
    """What decides a folder's content; a command that goes on with it must ask for the same."""

    weights: str  # a digest of the model's
    config: dict[str, Any]
    processor: dict[str, Any]
    pool: str
    file_format: str
    shape: list[int]  # of one image's features, float32
    shard_size: int  # images


class FeatureFolder:
    """Where features are written: shards, and features.json that says what they are."""

    def __init__(self, path: Path, request: Request) -> None:
        """A new or empty folder, or one that the same request began. ConfigError for any other."""
        self.path, self._request = path, request
        self._rows: list[int] = []  # of each shard that is done
        manifest = path / MANIFEST
        try:
            path.mkdir(parents=True, exist_ok=True)
            if manifest.exists():
                self._require_same(read_json(manifest))
            elif any(path.iterdir()):
                raise ConfigError(f"--out {path}: is not empty and holds no features; name a new folder")
        except (OSError, CheckpointError) as error:
            raise ConfigError(f"--out {path}: cannot be used: {error}; name a new folder") from None

    def go_on(self, sources: Iterator[ImageSource], tally: Tally) -> Iterator[ImageSource]:
        """What of the input is not yet in shards. DataError where the shards are of another input."""
        while (record := self._names(len(self._rows))).exists() and self._data(len(self._rows)).exists():
            names, skipped = self._recorded(record)
            for expected in names:
                source = next(sources, None)
                if source is None or source.name != expected:
                    raise DataError(
                        f"--out {self.path}: {record.name} has {expected} where the input now has "
                        f"{source.name if source else 'nothing more'}; name a new folder for other images"
                    )
            for name, reason in skipped:
                tally.skip(name, f"{reason} (when its shard was written; delete {record.name} to read it again)")
            self._rows.append(len(names) - len(skipped))
            tally.done_before(self._rows[-1])
        return sources

    def _recorded(self, record: Path) -> tuple[list[str], list[tuple[str, str]]]:
        """All names of a shard's images in their order, and which were skipped, with the reasons."""
        try:
            content = read_json(record)
            names = [*content["names"]]
            for each in content["skipped"]:
                names.insert(each["place"], each["name"])
            return names, [(each["name"], each["reason"]) for each in content["skipped"]]
        except (CheckpointError, KeyError, TypeError):
            raise DataError(
                f"--out {self.path}: {record.name} is damaged; delete it to have its shard made again"
            ) from None

    def write(self, batches: Iterable[tuple[ImageBatch, np.ndarray]]) -> None:
        """Write batches and their features [n, *shape] into shards, and features.json once all are there."""
        self._write_manifest(complete=False)
        shard: _Shard | None = None
        try:
            for batch, features in batches:
                rest = batch.entries
                while rest:
                    shard = shard or _Shard(self._data(len(self._rows)), self._request)
                    rest, features = shard.take(rest, features)
                    if shard.is_full:
                        self._put(shard)
                        shard = None
            # One of bad images alone is none: they are tried again next time.
            if shard is not None and shard.names:
                self._put(shard)
                shard = None
        finally:
            if shard is not None:
                shard.drop()
        self._write_manifest(complete=True)

    @property
    def images(self) -> int:
        return sum(self._rows)

    @property
    def shards(self) -> int:
        return len(self._rows)

    def _put(self, shard: _Shard) -> None:
        """A finished shard in its place."""
        shard.writer.close()
        put_in_place(_draft(shard.path), shard.path)
        content = {"names": shard.names, "skipped": shard.skipped}
        write_atomically(self._names(len(self._rows)), json.dumps(content, ensure_ascii=False, indent=0) + "\n")
        self._rows.append(len(shard.names))

    def _data(self, number: int) -> Path:
        return self.path / f"features-{number:05d}.{self._request.file_format}"

    def _names(self, number: int) -> Path:
        return self.path / f"features-{number:05d}.names.json"

    def _write_manifest(self, complete: bool) -> None:
        shards = [{"file": self._data(number).name, "images": rows} for number, rows in enumerate(self._rows)]
        content = {"format": VERSION, **asdict(self._request), "dtype": "float32", "complete": complete}
        text = json.dumps(content | {"images": self.images, "shards": shards}, ensure_ascii=False, indent=1)
        write_atomically(self.path / MANIFEST, text + "\n")

    def _require_same(self, content: dict[str, Any]) -> None:
        # Through JSON, which has no tuples.
        for key, value in json.loads(json.dumps(asdict(self._request))).items():
            if content.get(key) != value:
                brief = key in ("pool", "file_format", "shape", "shard_size")
                which = f" ({content.get(key)} there, {value} now)" if brief else ""
                raise ConfigError(
                    f"--out {self.path}: holds features of another {key}{which}; go on with what it was made with, "
                    "or name a new folder"
                )


class _Shard:
    """A shard being written."""

    def __init__(self, path: Path, request: Request) -> None:
        self.path, self._size = path, request.shard_size
        self.writer = (_Npy if request.file_format == "npy" else _Parquet)(_draft(path), request.shape)
        self.names: list[str] = []
        self.skipped: list[dict[str, Any]] = []

    @property
    def is_full(self) -> bool:
        return len(self.names) == self._size

    def take(self, entries: list[Entry], features: np.ndarray) -> tuple[list[Entry], np.ndarray]:
        """As many entries as fit, with their rows; what is left of both."""
        before, taken = len(self.names), 0
        while taken < len(entries) and not self.is_full:
            entry = entries[taken]
            if entry.bad is None:
                self.names.append(entry.name)
            else:
                place = len(self.names) + len(self.skipped)
                self.skipped.append({"place": place, "name": entry.name, "reason": entry.bad})
            taken += 1
        rows = len(self.names) - before
        self.writer.append(features[:rows], self.names[before:])
        return entries[taken:], features[rows:]

    def drop(self) -> None:
        """Forget what was written."""
        self.writer.close()
        _draft(self.path).unlink()


def _draft(path: Path) -> Path:
    """Always the same, so that what a killed command left of a shard is written over."""
    return path.with_name(f".{path.name}.tmp")


class _Npy:
    """float32 [n, *shape]; the header is written again once n is known, which NumPy's leaves room for."""

    def __init__(self, path: Path, shape: list[int]) -> None:
        self._shape, self._rows = shape, 0
        self._file = open(path, "wb")  # noqa: SIM115 - closed below
        self._start = self._header()

    def append(self, features: np.ndarray, names: list[str]) -> None:
        self._file.write(np.ascontiguousarray(features, dtype="<f4").data)
        self._rows += len(features)

    def close(self) -> None:
        with self._file:
            self._file.seek(0)
            assert self._header() == self._start

    def _header(self) -> int:
        """Where the rows start."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


class _Parquet:
    """Columns `name` and `features`: a flat list of float32, whose shape is in the schema's metadata."""

    def __init__(self, path: Path, shape: list[int]) -> None:
        import pyarrow
        import pyarrow.parquet

        self._arrow, self._width = pyarrow, int(np.prod(shape))
        columns = [("name", pyarrow.string()), ("features", pyarrow.list_(pyarrow.float32(), self._width))]
        self._schema = pyarrow.schema(columns, metadata={"shape": json.dumps(shape)})
        self._file = open(path, "wb")  # noqa: SIM115 - closed below
        self._table = pyarrow.parquet.ParquetWriter(self._file, self._schema)

    def append(self, features: np.ndarray, names: list[str]) -> None:
        if not names:
            return
        flat = self._arrow.array(np.ascontiguousarray(features, dtype=np.float32).reshape(-1))
        values = self._arrow.FixedSizeListArray.from_arrays(flat, self._width)
        self._table.write_batch(self._arrow.record_batch([self._arrow.array(names), values], schema=self._schema))

    def close(self) -> None:
        with self._file:
            self._table.close()
