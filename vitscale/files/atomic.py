"""Files and folders that appear whole under their name, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def draft_of(path: Path) -> Path:
    """A new name to write under what is to be `path`: hidden, in the same folder, the same on no other node."""
    return path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:12]}.tmp")  # a name may be as long as names can be


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A draft to write, a file or a folder: at the end it takes the place of `path`, after an error nothing is left.

    A folder can only take the place of none, or of an empty one. Whoever takes the draft away leaves `path` as it is.
    """
    draft = draft_of(path)
    try:
        yield draft
        if draft.exists():
            put_in_place(draft, path)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A hidden folder to write into: at the end what is in it moves to `folder`, which is made, `last` after the rest.

    Files are on disk before they have their names. After an error nothing is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = draft_of(folder / last)
    draft.mkdir()
    try:
        yield draft
        paths = sorted(draft.iterdir(), key=lambda path: path.name == last)
        for path in paths:
            if path.is_file():
                flush_to_disk(path)
        for path in paths:
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def put_in_place(draft: Path, path: Path) -> None:
    """Rename what was written to its own name; a file is on disk before it has it."""
    if draft.is_file():
        flush_to_disk(draft)
    os.replace(draft, path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old or the new one, never a part. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
