"""The index that a launcher has opened, for the rank 0 that it starts: no shard is asked for its size a second time."""

from __future__ import annotations

import os
from pathlib import Path

from vitscale.config.data import Data
from vitscale.data.index import ShardIndex
from vitscale.errors import DataError
from vitscale.files.atomic import write_atomically
from vitscale.files.stores import Stores

_FILE = ".index-of-launcher"


def hand_over(index: ShardIndex, data: Data, folder: Path) -> None:
    """Leave the index of data.train in the run's folder."""
    write_atomically(folder / _FILE, _asked(data) + index.to_bytes())


def taken_over(data: Data, folder: Path, store: Stores) -> ShardIndex | None:
    """What `hand_over` left for the same keys, once; None where nothing is left."""
    path, asked = folder / _FILE, _asked(data)
    try:
        content = path.read_bytes()
        path.unlink()
        return ShardIndex.from_bytes(content.removeprefix(asked), store) if content.startswith(asked) else None
    except (OSError, DataError):  # then it is opened as ever
        return None


def _asked(data: Data) -> bytes:
    keys = (os.getcwd(), data.train, data.index, data.label_extension, data.image)
    return f"{keys}\n".encode(errors="backslashreplace")
