"""Counts that other tools declare beside shards: open_clip's sizes.json, img2dataset's NAME_stats.json."""

from __future__ import annotations

import glob
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from vitscale.files.store import Store

_THREADS = 16


class Declared(NamedTuple):
    """How many samples a file says that a shard holds."""

    samples: int
    file: str


def declared_counts(store: Store, folder: str) -> dict[str, Declared]:
    """By the shards' file names. folder: "" or with a slash at the end."""
    files = _list(store, os.path.join(glob.escape(folder), "*_stats.json"))
    with ThreadPoolExecutor(_THREADS) as pool:
        stats = zip(files, pool.map(lambda file: _json(store, file), files), strict=True)
        counts = {os.path.basename(file).removesuffix("_stats.json") + ".tar": _of_stats(file, content)
                  for file, content in stats}  # fmt: skip
    counts |= _of_sizes(store, folder)
    return {name: count for name, count in counts.items() if count is not None}


def declared_count(store: Store, path: str) -> Declared | None:
    """Of one shard."""
    folder, name = os.path.split(path)
    file = path.removesuffix(".tar") + "_stats.json"
    return _of_sizes(store, folder).get(name) or _of_stats(file, _json(store, file))


def _of_stats(file: str, content: Any) -> Declared | None:
    count = content.get("successes") if isinstance(content, dict) else None
    return Declared(count, file) if isinstance(count, int) and count > 0 else None


def _of_sizes(store: Store, folder: str) -> dict[str, Declared | None]:
    file = os.path.join(folder, "sizes.json")
    sizes = _json(store, file)
    counts = sizes.items() if isinstance(sizes, dict) else ()
    return {os.path.basename(name): Declared(count, file) for name, count in counts
            if isinstance(count, int) and count > 0}  # fmt: skip


def _list(store: Store, pattern: str) -> list[str]:
    """What matches; nothing where a store does not list."""
    try:
        return store.list(pattern)
    except OSError:
        return []


def _json(store: Store, path: str) -> Any:
    try:
        return json.loads(store.read(path, 0, store.stat(path).bytes))
    except (OSError, ValueError, RecursionError):
        return None
