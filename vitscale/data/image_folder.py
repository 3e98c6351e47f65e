"""Folders of images in the place of shards: packed into the run's folder on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitscale.config.schema import Source
from vitscale.data.pack import class_folders, pack

PACKED = "packed"  # in the run's folder; packed-validation for data.validation


def is_image_folder(pattern: str) -> bool:
    """Whether a pattern is the name of a folder without shards in it."""
    folder = Path(pattern)
    return folder.is_dir() and not any(folder.glob("*.tar"))


def packed_sources(sources: tuple[Source, ...], out: Path) -> tuple[Source, ...]:
    """The shards that stand, or will stand, for a folder of images; other sources as they are."""
    if len(sources) == 1 and is_image_folder(sources[0].pattern):
        return (Source(f"{out}/*.tar"),)
    return sources


def pack_folder(sources: tuple[Source, ...], out: Path, classes: Sequence[str] | None = None) -> None:
    """Pack a folder of images into `out`, unless an earlier start has done so; nothing for other sources.

    classes: their names by label, where these are not the folder's own.
    """
    if sources == packed_sources(sources, out):
        return
    folder = sources[0].pattern
    if (out / "index.json").exists():
        print(f"{folder}: packed in {out}; remove that folder to have it packed again", flush=True)
        return
    print(f"{folder}: is a folder of images; packing it into {out}, once", flush=True)
    for draft in out.glob("*") if out.is_dir() else ():  # of a start that was cut off: the index comes last
        draft.unlink()
    pack(Path(folder), out, classes=classes)


def classes_of(sources: tuple[Source, ...]) -> list[str] | None:
    """The classes of a folder of images; None for anything else."""
    if len(sources) == 1 and is_image_folder(sources[0].pattern):
        return class_folders(Path(sources[0].pattern)) or None
    return None
