"""What a data set consists of: a row a shard, from an index file or from a scan of the shards' headers."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import braceexpand
import numpy as np

from vitscale.config.schema import Source
from vitscale.data.tar import scan_shard
from vitscale.errors import DataError

Result = TypeVar("Result")
FORMAT = "vitscale-index-1"
_MOST_SHARDS = 10_000_000
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The shards of a data set, in order; a sample id is shard << 32 | place in the shard."""

    paths: tuple[str, ...]
    names: tuple[str, ...]  # file name without .tar, with folders before it where two would be the same
    samples: np.ndarray  # int64 [shards]
    bytes: np.ndarray  # int64 [shards]
    sha256: tuple[str | None, ...]
    modified: tuple[int, ...]  # nanoseconds; tells a stale row

    @property
    def total(self) -> int:
        return int(self.samples.sum())

    @cached_property
    def digest(self) -> str:
        """Hex digest of names, samples and bytes: equal wherever the shards lie, other when one changed."""
        rows = zip(self.names, self.samples.tolist(), self.bytes.tolist(), strict=True)
        return hashlib.sha256("".join(f"{name} {n} {size}\n" for name, n, size in rows).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write JSON that `load` reads; shards at or below its folder are named relative to it."""
        folder = os.path.abspath(path.parent)
        rows = []
        for i, shard in enumerate(self.paths):
            inside = os.path.commonpath([folder, os.path.abspath(shard)]) == folder
            rows.append(
                {
                    "name": os.path.relpath(shard, folder) if inside else os.path.abspath(shard),
                    "samples": int(self.samples[i]),
                    "bytes": int(self.bytes[i]),
                    "sha256": self.sha256[i],
                    "mtime_ns": self.modified[i],
                }
            )
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # many nodes may write at once
        lines = ",\n".join(json.dumps(row) for row in rows)
        try:
            temporary.write_text(f'{{"format": "{FORMAT}", "shards": [\n{lines}\n]}}\n')
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> ShardIndex:
        """DataError for what is no index of ours."""
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format is {content['format']!r}, not {FORMAT!r}")
            rows = [_Row.read(row, path.parent) for row in content["shards"]]
        except OSError as error:
            raise DataError(f"data.index={path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"data.index={path}: is no index as `vitscale index` makes it: {error!r}") from None
        return _assemble(rows)


@dataclass(frozen=True)
class _Row:
    path: str
    samples: int
    bytes: int
    sha256: str | None
    modified: int

    @staticmethod
    def read(row: dict[str, Any], folder: Path) -> _Row:
        samples, size = int(row["samples"]), int(row["bytes"])
        if samples < 1 or size < 1 or not isinstance(row["name"], str):
            raise ValueError(f"bad row {row}")
        return _Row(str(folder / row["name"]), samples, size, row.get("sha256"), int(row.get("mtime_ns", 0)))


def open_index(sources: tuple[Source, ...], index_path: str | None, cache: Path) -> ShardIndex:
    """The index of the shards that `sources` name.

    From the file `index_path` (data.index) if given; else from index.json beside the shards where its rows are
    not stale, and the rest by a scan, kept beside the shards or, where that cannot be written, in the folder
    `cache`. DataError names the pattern, the shard or the file at fault.
    """
    if len({source.weight for source in sources}) > 1:
        raise DataError("data.train: weights are not supported yet: every shard is read once an epoch; leave them out")
    paths = expand(sources)
    if index_path is not None:
        return _from_file(paths, Path(index_path))
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(os.path.dirname(os.path.abspath(path)), []).append(path)
    rows: dict[str, _Row] = {}
    for folder, inside in folders.items():
        rows.update(_folder_rows(Path(folder), inside, cache))
    return _assemble([rows[path] for path in paths])


def build_index(paths: Sequence[str], sha256: Sequence[str] | None = None) -> ShardIndex:
    """Count every shard by its headers, and read it whole for its sha256 where that is not given."""
    rows = _in_threads(lambda path: _scanned(path, None), paths)
    digests = _in_threads(_sha256, paths) if sha256 is None else sha256
    return _assemble([replace(row, sha256=digest) for row, digest in zip(rows, digests, strict=True)])


def require_labels(index: ShardIndex, label: str) -> None:
    """DataError when no sample of the first shard has a label: told at the start, not after an hour."""
    table = scan_shard(index.paths[0])
    if label not in table.kinds:
        kinds = ", ".join(sorted(table.kinds))
        raise DataError(
            f"{index.paths[0]}: no member has the extension data.label={label!r} (it has {kinds}), and the objective "
            "needs labels: set data.label to the extension that holds a whole number, or pack from one folder a class"
        )


def expand(sources: Iterable[Source]) -> list[str]:
    """Paths of local shards: brace ranges expanded as webdataset does, then wildcards, sorted.

    DataError for a pattern that matches nothing, for any scheme but file:, and for a shard named twice.
    """
    paths = [path for source in sources for path in _expand(source.pattern)]
    if not paths:
        raise DataError("data.train is empty: give a pattern of shards, say data.train=/data/train-{0000..0099}.tar")
    twice = [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]}: is named twice by data.train; name each shard once")
    return paths


def _expand(pattern: str) -> list[str]:
    scheme = _SCHEME.match(pattern)
    if scheme and scheme[1].lower() != "file":
        raise DataError(
            f"shards {pattern!r}: only local paths are read, not {scheme[1]}: URLs (which, for pipe:, would be run as "
            "commands); copy the shards to a file system and name them there"
        )
    local = re.sub(r"^file:(//)?", "", pattern, flags=re.IGNORECASE)
    ranges = [[int(number or 1) for number in found] for found in _RANGE.findall(local)]
    count = math.prod(abs(last - first) // max(1, abs(step)) + 1 for first, last, step in ranges)
    if count > _MOST_SHARDS:
        raise DataError(f"shards {pattern!r}: its braces stand for {count} paths; at most {_MOST_SHARDS} are taken")
    try:
        names = list(braceexpand.braceexpand(local))
    except ValueError as error:
        raise DataError(f"shards {pattern!r}: {error}") from None
    paths: list[str] = []
    for name in names:
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] if os.path.exists(name) else []
        if not found:
            which = "" if name == pattern else f" ({name})"
            raise DataError(f"shards {pattern!r}: no such file{which}; check the path and the brace range")
        paths += found
    return paths


def _from_file(paths: list[str], index_path: Path) -> ShardIndex:
    whole = ShardIndex.load(index_path)
    place = {os.path.realpath(path): i for i, path in enumerate(whole.paths)}
    rows = []
    for path, stat in zip(paths, _in_threads(_stat, paths), strict=True):
        i = place.get(os.path.realpath(path))
        if i is None:
            raise DataError(f"data.index={index_path}: has no row for {path}; make it again with `vitscale index`")
        row = _Row(path, int(whole.samples[i]), int(whole.bytes[i]), whole.sha256[i], whole.modified[i])
        if row.bytes != stat.st_size:
            raise DataError(
                f"{path}: has {stat.st_size} bytes, data.index={index_path} says {row.bytes}; "
                "bring the shard back or make the index again with `vitscale index`"
            )
        rows.append(row)
    return _assemble(rows)


def _folder_rows(folder: Path, paths: list[str], cache: Path) -> dict[str, _Row]:
    """Rows of the shards in one folder, from its cache file where fresh; what was scanned is cached."""
    beside = folder / "index.json"
    elsewhere = cache / f"index-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}.json"
    known = _cached(elsewhere) | _cached(beside)
    rows: dict[str, _Row] = {}
    for path, stat in zip(paths, _in_threads(_stat, paths), strict=True):
        old = known.get(os.path.realpath(path))
        if old and (old.bytes, old.modified) == (stat.st_size, stat.st_mtime_ns):
            rows[path] = replace(old, path=path)
    stale = [path for path in paths if path not in rows]
    if stale:
        declared = _declared(folder)

        def scan(path: str) -> _Row:
            return _scanned(path, known.get(os.path.realpath(path)), declared=declared.get(os.path.basename(path)))

        rows |= dict(zip(stale, _in_threads(scan, stale), strict=True))
        ours = {os.path.realpath(path) for path in paths}
        others = [row for path, row in known.items() if path not in ours and os.path.exists(path)]
        _write_cache(_assemble(sorted([*rows.values(), *others], key=lambda row: row.path)), beside, elsewhere)
    return rows


def _cached(path: Path) -> dict[str, _Row]:
    """Rows of a cache file by real path; none where there is no file, or one that another tool made."""
    try:
        index = ShardIndex.load(path)
    except DataError:
        return {}
    columns = zip(index.paths, index.samples.tolist(), index.bytes.tolist(), index.sha256, index.modified, strict=True)
    return {os.path.realpath(row[0]): _Row(os.path.realpath(row[0]), *row[1:]) for row in columns}


def _write_cache(index: ShardIndex, beside: Path, elsewhere: Path) -> None:
    """Beside the shards unless another tool's index.json lies there or nothing may be written."""
    if not beside.exists() or _cached(beside):
        with contextlib.suppress(OSError):
            index.save(beside)
            return
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    index.save(elsewhere)


def _declared(folder: Path) -> dict[str, int]:
    """Counts that open_clip's sizes.json or img2dataset's NAME_stats.json declare, by file name.

    They spare the scan of many shards at a start; a shard is held to its count when it is read.
    """
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*_stats.json")):
        content = _json(path)
        if isinstance(content, dict) and isinstance(content.get("successes"), int):
            counts[path.name.removesuffix("_stats.json") + ".tar"] = content["successes"]
    sizes = _json(folder / "sizes.json")
    if isinstance(sizes, dict):
        counts |= {os.path.basename(name): count for name, count in sizes.items() if isinstance(count, int)}
    return {name: count for name, count in counts.items() if count > 0}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _scanned(path: str, old: _Row | None, declared: int | None = None) -> _Row:
    """A shard's row from its headers; a packer's sha256 stays while size and count do."""
    stat = _stat(path)
    samples = declared or len(scan_shard(path))
    same = old is not None and (old.samples, old.bytes) == (samples, stat.st_size)
    return _Row(path, samples, stat.st_size, old.sha256 if old and same else None, stat.st_mtime_ns)


def _sha256(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _in_threads(work: Callable[[str], Result], paths: Sequence[str], threads: int = 16) -> list[Result]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, paths))


def _assemble(rows: list[_Row]) -> ShardIndex:
    paths = [row.path for row in rows]
    return ShardIndex(
        paths=tuple(paths),
        names=tuple(_names(paths)),
        samples=np.array([row.samples for row in rows], dtype=np.int64),
        bytes=np.array([row.bytes for row in rows], dtype=np.int64),
        sha256=tuple(row.sha256 for row in rows),
        modified=tuple(row.modified for row in rows),
    )


def _names(paths: list[str]) -> list[str]:
    """File names without .tar; where two are the same, all with their folders below the common one."""
    names = [os.path.basename(path).removesuffix(".tar") for path in paths]
    if len(set(names)) < len(names):
        above = os.path.commonpath([os.path.abspath(path) for path in paths])
        names = [os.path.relpath(os.path.abspath(path), above).removesuffix(".tar") for path in paths]
    return names
