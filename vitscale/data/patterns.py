"""What a user writes as shards -> paths."""

from __future__ import annotations

import fnmatch
import glob
import math
import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain

import braceexpand

from vitscale.config.schema import Source
from vitscale.errors import DataError
from vitscale.files.retry import unreadable
from vitscale.files.store import LocalFiles, Paths, Store, absolute, is_remote, split_existing
from vitscale.files.stores import REMOTE, Stores, require_no_secret

_MOST_SHARDS = 10_000_000
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_KEPT = ("/index.json", "/index.tables")  # what we keep beside shards; a pattern's * means none of it
_LISTS = (".csv", ".tsv", ".parquet")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def expand(sources: Iterable[Source], store: Store | None = None, key: str = "shards") -> list[str]:
    """Absolute paths, or URLs, of shards: brace ranges expanded as webdataset does, then wildcards, sorted.

    key: what messages call the sources. DataError for wildcards that match nothing and for a scheme that is not read,
    ConfigError for a URL with a password. Whether a file that is named without wildcards is there, its stat will tell.
    """
    store = store or Stores()
    here = os.path.join(os.getcwd(), "")  # other ranks get these paths, and may have another working directory
    found = chain.from_iterable(_expand(source.pattern, store, key) for source in sources)
    paths = [path if path.startswith("/") or is_remote(path) else here + path for path in found]
    if not paths:
        raise DataError(f"{key} is empty: give a pattern of shards, say {key}=/data/train-{{0000..0099}}.tar")
    return paths


def expand_among(source: Source, paths: Sequence[str], key: str) -> list[str]:
    """As `expand`, of absolute paths that are known, whether or not they are there."""
    return expand([source], _Known(paths), key)


class _Known(LocalFiles):
    """Lists files by their paths alone."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self._paths = [path.split("/") for path in paths]

    def list(self, pattern: str) -> Paths:
        parts = absolute(pattern).split("/")
        return sorted("/".join(path) for path in self._paths if _matches(path, parts))


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Folder by folder; ** stands for any number of them."""
    if not pattern or not path:
        return not pattern and not path
    if pattern[0] == "**":
        return any(_matches(path[start:], pattern[1:]) for start in range(len(path)))
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _expand(pattern: str, store: Store, key: str) -> list[str]:
    said, scheme = f"{key}={pattern!r}", _SCHEME.match(pattern)
    if scheme and scheme[1].lower() not in ("file", *REMOTE) and not _is_there(pattern):
        raise DataError(
            f"{said}: {scheme[1]}: is not read (pipe: would run a command); name a path that is there, or a URL of "
            f"{', '.join(REMOTE)}"
        )
    local = re.sub(r"^file:(//)?", "", pattern, flags=re.IGNORECASE)
    if is_remote(local):
        require_no_secret(local, key)
        names = _braces(local, said)
        if local.lower().startswith("http") and "*" in local:
            raise DataError(f"{said}: HTTP servers do not list files: write a brace range, say {{000..099}}")
        return names if local.lower().startswith("http") else _matched(names, local, said, store)  # ? begins a query
    local = os.path.expanduser(local)
    if os.path.isfile(local):  # its name may look like a pattern
        if local.lower().endswith(_LISTS):
            raise DataError(f"{said}: is a list; `vitscale pack {local} NEW_FOLDER` makes shards of it")
        return [local]
    if os.path.isdir(local):
        folder = local.rstrip("/")
        raise DataError(
            f"{said}: is a folder; name the shards in it, say '{folder}/*.tar' (of a folder of images, `vitscale pack "
            f"{folder} NEW_FOLDER` makes shards)"
        )
    folder, rest = split_existing(local)
    names = _braces(rest, said)
    folder = glob.escape(folder) if glob.has_magic(rest) else folder
    before = os.path.join(folder, "")
    return _matched([before + name for name in names], rest, said, store)


def _is_there(pattern: str) -> bool:
    """Whether what looks like a URL is a path of this machine: a:b/x.tar, in a folder whose name has a colon."""
    if split_existing(pattern)[0] or os.path.lexists(pattern):
        return True
    try:
        first = next(iter(braceexpand.braceexpand(pattern)))
    except ValueError:
        return False
    return next(glob.iglob(first), None) is not None


def _braces(text: str, said: str) -> list[str]:
    """What the braces of a part of a pattern stand for."""
    ranges = [[int(number or 1) for number in found] for found in _RANGE.findall(text)]
    count = math.prod(abs(last - first) // max(1, abs(step)) + 1 for first, last, step in ranges)
    if count > _MOST_SHARDS:
        raise DataError(f"{said}: its braces stand for {count} paths; at most {_MOST_SHARDS} are taken")
    try:
        # Looking for backslashes in each of many names takes longer than the names.
        return list(braceexpand.braceexpand(text, escape="\\" in text))
    except ValueError as error:
        raise DataError(f"{said}: {error}") from None


def _matched(names: list[str], written: str, said: str, store: Store) -> list[str]:
    """Each name, or what it matches where it has wildcards. written: the part of the pattern that can have some."""
    if not glob.has_magic(written):
        return names
    paths: list[str] = []
    for name in names:
        found = _listed(name, said, store) if glob.has_magic(name) else [name]
        if not found:
            which = "" if len(names) == 1 else f" ({name})"
            raise DataError(f"{said}: no such file{which}; check the path and the brace range")
        paths += found
    return paths


def _listed(pattern: str, said: str, store: Store) -> list[str]:
    try:
        return [path for path in store.list(pattern) if not path.endswith(_KEPT)]
    except OSError as error:
        raise unreadable(said, error, " as a list") from None
