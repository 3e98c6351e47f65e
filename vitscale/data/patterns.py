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
from vitscale.files.retry import unreadable
from vitscale.files.store import Store, is_remote, split_existing
from vitscale.files.stores import REMOTE, Stores, require_no_secret

_MOST_SHARDS = 10_000_000
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_KEPT = ("/index.json", "/index.tables")  # what we keep beside shards; a pattern's * means none of it
_LISTS = (".csv", ".tsv", ".parquet")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def expand(sources: Iterable[Source], store: Store | None = None) -> list[str]:
    """Absolute paths, or URLs, of shards: brace ranges expanded as webdataset does, then wildcards, sorted.

    DataError for wildcards that match nothing and for a scheme that is not read, ConfigError for a URL with a password.
    Whether a file that is named without wildcards is there, its stat will tell.
    """
    store = store or Stores()
    here = os.path.join(os.getcwd(), "")  # other ranks get these paths, and may have another working directory
    found = chain.from_iterable(_expand(source.pattern, store) for source in sources)
    paths = [path if path.startswith("/") or is_remote(path) else here + path for path in found]
    if not paths:
        raise DataError("data.train is empty: give a pattern of shards, say data.train=/data/train-{0000..0099}.tar")
    return paths


def _expand(pattern: str, store: Store) -> list[str]:
    scheme = _SCHEME.match(pattern)
    if scheme and scheme[1].lower() not in ("file", *REMOTE):
        raise DataError(
            f"shards {pattern!r}: {scheme[1]}: is not read (pipe: would run a command); name a path, or a URL of "
            f"{', '.join(REMOTE)}"
        )
    local = re.sub(r"^file:(//)?", "", pattern, flags=re.IGNORECASE)
    if is_remote(local):
        require_no_secret(local, "data.train")
        names = _braces(local, pattern)
        if local.lower().startswith("http") and "*" in local:
            raise DataError(
                f"shards {pattern!r}: HTTP servers do not list files: write a brace range, say {{000..099}}"
            )
        return names if local.lower().startswith("http") else _matched(names, pattern, store)  # there ? begins a query
    local = os.path.expanduser(local)
    if os.path.isfile(local):  # its name may look like a pattern
        if local.lower().endswith(_LISTS):
            raise DataError(f"shards {pattern!r}: is a list; `vitscale pack {local} NEW_FOLDER` makes shards of it")
        return [local]
    if os.path.isdir(local):
        folder = local.rstrip("/")
        raise DataError(
            f"shards {pattern!r}: is a folder; name the shards in it, say data.train='{folder}/*.tar' (of a folder of "
            f"images, `vitscale pack {folder} NEW_FOLDER` makes shards)"
        )
    folder, rest = split_existing(local)
    names = _braces(rest, pattern)
    folder = glob.escape(folder) if glob.has_magic(rest) else folder
    before = os.path.join(folder, "")
    return _matched([before + name for name in names], pattern, store, rest)


def _braces(text: str, pattern: str) -> list[str]:
    """What the braces of a part of `pattern` stand for."""
    ranges = [[int(number or 1) for number in found] for found in _RANGE.findall(text)]
    count = math.prod(abs(last - first) // max(1, abs(step)) + 1 for first, last, step in ranges)
    if count > _MOST_SHARDS:
        raise DataError(f"shards {pattern!r}: its braces stand for {count} paths; at most {_MOST_SHARDS} are taken")
    try:
        # Looking for backslashes in each of many names takes longer than the names.
        return list(braceexpand.braceexpand(text, escape="\\" in text))
    except ValueError as error:
        raise DataError(f"shards {pattern!r}: {error}") from None


def _matched(names: list[str], pattern: str, store: Store, written: str | None = None) -> list[str]:
    """Each name, or what it matches where it has wildcards. written: the part of them that can have some."""
    if not glob.has_magic(pattern if written is None else written):
        return names
    paths: list[str] = []
    for name in names:
        found = _listed(name, store) if glob.has_magic(name) else [name]
        if not found:
            which = "" if name == pattern else f" ({name})"
            raise DataError(f"shards {pattern!r}: no such file{which}; check the path and the brace range")
        paths += found
    return paths


def _listed(pattern: str, store: Store) -> list[str]:
    try:
        return [path for path in store.list(pattern) if not path.endswith(_KEPT)]
    except OSError as error:
        raise unreadable(f"shards {pattern!r}", error, " as a list") from None
