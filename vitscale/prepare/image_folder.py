"""Folders of images in the place of shards: packed into the run's folder on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from vitscale.config.schema import Source
from vitscale.errors import DataError
from vitscale.files.folder import LeftOut, class_folders, walk
from vitscale.prepare.pack import pack
from vitscale.text import as_text

_MADE_OF = "made-of"  # beside the shards: a digest of the names of their images
PACKED = "packed"  # in the run's folder; packed-validation for data.validation


def is_image_folder(pattern: str) -> bool:
    """Whether a pattern is the name of a folder without shards in it."""
    folder = Path(pattern)
    return folder.is_dir() and not any(folder.glob("*.tar"))


def folder_of(sources: tuple[Source, ...]) -> Path | None:
    """The folder of images that stands in the place of shards; None for anything else."""
    return Path(sources[0].pattern) if len(sources) == 1 and is_image_folder(sources[0].pattern) else None


def packed_sources(sources: tuple[Source, ...], out: Path) -> tuple[Source, ...]:
    """The shards that stand, or will stand, for a folder of images; other sources as they are."""
    return sources if folder_of(sources) is None else (Source(f"{out}/*.tar"),)


def pack_folder(sources: tuple[Source, ...], out: Path, classes: Sequence[str] | None = None) -> None:
    """Pack a folder of images into `out`, unless an earlier start has done so; nothing for other sources.

    classes: their names by label, where these are not the folder's own.
    """
    folder, made_of = folder_of(sources), out / _MADE_OF
    if folder is None:
        return
    names = _digest(folder)
    if (out / "index.json").exists():
        if made_of.exists() and made_of.read_text(encoding="ascii") != names:
            raise DataError(
                f"{out}: was packed of other images than {folder} has now; name another run (run.name), or remove it "
                "to have them packed again"
            )
        print(f"{folder}: packed in {out}; remove that folder to have it packed again", flush=True)
        return
    print(f"{folder}: is a folder of images; packing it into {out}, once", flush=True)
    own = classes is not None and list(classes) == classes_of(sources)
    pack(folder, out, classes=None if own else classes)
    made_of.write_text(names, encoding="ascii")


def _digest(folder: Path) -> str:
    """Of the paths of all images below a folder, not of its own: it may lie elsewhere at the next start."""
    names = sorted(os.fsencode(path.relative_to(folder)) for path in walk(folder, LeftOut()))
    return hashlib.sha256(b"\0".join(names)).hexdigest()


def classes_of(sources: tuple[Source, ...]) -> list[str] | None:
    """The classes of a folder of images; None for anything else."""
    folder = folder_of(sources)
    return None if folder is None else [as_text(path.name) for path in class_folders(folder, LeftOut())] or None
