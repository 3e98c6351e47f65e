"""The classes' names, as `vitscale pack` leaves them beside shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from vitscale.errors import DataError
from vitscale.files.retry import unreadable
from vitscale.files.store import LocalFiles, Store, absolute, is_remote
from vitscale.text import listed

CLASSES = "classes.json"


def class_names(
    shards: Iterable[str | Path], store: Store | None = None, one_meaning: bool = False
) -> list[str] | None:
    """Names by label, from classes.json in the folder of these shards or the one above it.

    store: where the shards lie (default: on this machine). None where there is none, or where not all shards have the
    same. DataError where it is no list of names and, with `one_meaning`, where two differ: a label would mean two
    classes.
    """
    store = store or LocalFiles()
    folders = sorted({os.path.dirname(shard) for shard in shards})
    found = [_of_folder(folder, store) for folder in folders]
    named = [(folder, names) for folder, names in zip(folders, found, strict=True) if names is not None]
    for folder, names in named if one_meaning else ():
        if names != named[0][1]:
            raise DataError(
                f"classes.json of {named[0][0]} says {listed(named[0][1])}, that of {folder} {listed(names)}: a label "
                "would mean two classes; pack both anew with the same --classes"
            )
    return found[0] if found and all(names == found[0] for names in found) else None


def _of_folder(folder: str, store: Store) -> list[str] | None:
    above = os.path.dirname(absolute(folder))
    for path in (os.path.join(folder, CLASSES), os.path.join(above, CLASSES)):
        try:
            data = store.read(path, 0, store.stat(path).bytes)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if is_remote(path) and isinstance(error, PermissionError):  # a bucket may hide what it does not have
                continue
            raise unreadable(path, error) from None
        return _names(data, path)
    return None


def read_names(path: Path) -> list[str]:
    """The names in a classes.json. DataError where it is none."""
    try:
        return _names(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read as the classes' names: {error.strerror}") from None


def _names(data: bytes, path: str) -> list[str]:
    try:
        names = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as the classes' names: {error}; mend it or take it away") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: must be a list of the classes' names, by their labels; mend it or take it away")
    return names
