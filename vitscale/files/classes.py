"""The classes' names, as `vitscale pack` leaves them beside shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from vitscale.errors import DataError

CLASSES = "classes.json"


def class_names(shards: Iterable[str | Path]) -> list[str] | None:
    """Names by label, from classes.json in the folder of these shards or the one above it.

    None where there is none, or where not all shards have the same. DataError where it is no list of names.
    """
    found = [_of_folder(Path(folder)) for folder in {os.path.dirname(shard) for shard in shards}]
    return found[0] if found and all(names == found[0] for names in found) else None


def _of_folder(folder: Path) -> list[str] | None:
    for path in (folder / CLASSES, folder.absolute().parent / CLASSES):
        if path.is_file():
            return read_names(path)
    return None


def read_names(path: Path) -> list[str]:
    """The names in a classes.json. DataError where it is none."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as the classes' names: {error}; mend it or take it away") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: must be a list of the classes' names, by their labels; mend it or take it away")
    return names
