"""What a user writes as shards -> paths."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable
from itertools import chain

import braceexpand

from vitscale.config.schema import Source
from vitscale.errors import DataError
from vitscale.files.store import LocalFiles, Store

_MOST_SHARDS = 10_000_000
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_KEPT = ("/index.json", "/index.tables")  # what we keep beside shards; a pattern's * means none of it
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def expand(sources: Iterable[Source], store: Store | None = None) -> list[str]:
    """Absolute paths of local shards: brace ranges expanded as webdataset does, then wildcards, sorted.

    DataError for wildcards that match nothing and for any scheme but file:. Whether a file that is named without
    wildcards is there, its stat will tell.
    """
    store = store or LocalFiles()
    here = os.path.join(os.getcwd(), "")  # other ranks get these paths, and may have another working directory
    found = chain.from_iterable(_expand(source.pattern, store) for source in sources)
    paths = [path if path.startswith("/") else here + path for path in found]
    if not paths:
        raise DataError("data.train is empty: give a pattern of shards, say data.train=/data/train-{0000..0099}.tar")
    return paths


def _expand(pattern: str, store: Store) -> list[str]:
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
        # Looking for backslashes in each of many names takes longer than the names.
        names = list(braceexpand.braceexpand(local, escape="\\" in local))
    except ValueError as error:
        raise DataError(f"shards {pattern!r}: {error}") from None
    if len(names) == 1 and os.path.isdir(names[0]):
        folder = local.rstrip("/")
        raise DataError(
            f"shards {pattern!r}: is a folder; name the shards in it, say data.train='{folder}/*.tar' (of a folder of "
            f"images, `vitscale pack {folder} NEW_FOLDER` makes shards)"
        )
    if not glob.has_magic(local):
        return names
    paths: list[str] = []
    for name in names:
        found = [path for path in store.list(name) if not path.endswith(_KEPT)] if glob.has_magic(name) else [name]
        if not found:
            which = "" if name == pattern else f" ({name})"
            raise DataError(f"shards {pattern!r}: no such file{which}; check the path and the brace range")
        paths += found
    return paths
