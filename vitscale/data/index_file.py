"""The file that keeps an index: `vitscale-index-1`, JSON with a shard a line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitscale.errors import ConfigError, DataError, InfrastructureError
from vitscale.files.retry import unreadable
from vitscale.files.store import Store, absolute, is_remote, read_pieces

FORMAT = "vitscale-index-1"
RULES = 2  # of what a sample is, in files/tar.py; an index that does not say was counted by the first ones
_OLD_HEAD = f'{{"format": "{FORMAT}", "shards": [\n'.encode()
_HEAD = f'{{"format": "{FORMAT}", "rules": {RULES}, "shards": [\n'.encode()
_NEXT = b"},\n"  # between two rows
_END = b"\n]}\n"
_READ = 1 << 18  # bytes read, and parsed, at once


class Rows(NamedTuple):
    """Rows of an index, as columns."""

    paths: Sequence[str]
    samples: np.ndarray  # int64
    bytes: np.ndarray  # int64
    sha256: Sequence[str | None]
    modified: np.ndarray  # int64, nanoseconds; tells a stale row


def read_rows(store: Store, path: str) -> Iterator[Rows]:
    """The file's rows, some at a time, their paths from its folder on. DataError for what is no index of ours."""
    try:
        for entries in _entries(store, path):
            yield _rows(entries, os.path.dirname(path))
    except OSError as error:
        raise unreadable(f"data.index={path}", error) from None
    except (ConfigError, InfrastructureError):  # ValueErrors too, but not for what is in the file
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"data.index={path}: is no index as `vitscale index` makes it: {type(error).__name__}: {error}"
        ) from None


def is_current(store: Store, path: str) -> bool:
    """Whether an index was counted by the rules of now. OSError where there is none."""
    found = re.search(rb'"rules":\s*(\d+)', store.read(path, 0, 200))
    return found is not None and int(found[1]) == RULES


def write_rows(store: Store, path: str, rows: Rows) -> None:
    """Shards at or below the file's folder are named relative to it. OSError where it cannot be written."""
    folder = absolute(os.path.dirname(path))
    inside = folder.rstrip("/") + "/"
    lines = []
    for shard, samples, size, sha256, modified in zip(*rows, strict=True):
        whole = absolute(shard)
        row = {
            "name": whole.removeprefix(inside),
            "samples": int(samples),
            "bytes": int(size),
            "sha256": sha256,
            "mtime_ns": int(modified),
        }
        lines.append(json.dumps(row))
    store.write(path, _HEAD + ",\n".join(lines).encode() + _END)


def _entries(store: Store, path: str) -> Iterator[list[Any]]:
    """The file's rows as JSON has them: by the line where it is laid out as we write it, else read whole."""
    pieces = read_pieces(store, path, _READ)
    rest = next(pieces, b"")
    head = _HEAD if rest.startswith(_HEAD) else _OLD_HEAD
    if rest.startswith(head):
        rest = rest[len(head) :]
        for piece in pieces:
            rows, end, begun = rest.rpartition(_NEXT)
            try:
                yield json.loads(b"[" + rows + b"}]") if end else []
            except ValueError:  # rows laid out otherwise, or no JSON at all: seen below
                rest += piece
                break
            rest = begun + piece
        rest = head + rest
    content = json.loads(rest + b"".join(pieces))
    if content["format"] != FORMAT:
        raise ValueError(f"format is {content['format']!r}, not {FORMAT!r}")
    yield content["shards"]


def _rows(entries: list[Any], folder: str) -> Rows:
    before = os.path.join(folder, "")
    names = [entry["name"] for entry in entries]
    if is_remote(before):
        _require_below(names, before)
    rows = Rows(
        [name if name.startswith("/") or is_remote(name) else before + name for name in names],
        np.array([entry["samples"] for entry in entries], dtype=np.int64),
        np.array([entry["bytes"] for entry in entries], dtype=np.int64),
        [entry.get("sha256") for entry in entries],
        np.array([entry.get("mtime_ns", 0) for entry in entries], dtype=np.int64),
    )
    bad = np.flatnonzero((rows.samples < 1) | (rows.bytes < 1))
    if len(bad):
        raise ValueError(f"bad row {entries[bad[0]]}")
    return rows


def _require_below(names: Sequence[str], folder: str) -> None:
    """An index that comes from elsewhere may name shards of its own server or bucket alone: ValueError."""
    origin = "/".join(folder.split("/")[:3]) + "/"
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or (is_remote(name) and not name.startswith(origin)):
            raise ValueError(f"names {name!r}, which is not of {origin}")
