"""What lies in a folder of images: one set of rules for whoever walks one."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vitscale.files.header import IMAGE_KINDS, image_kind
from vitscale.text import as_text, listed

HEAD = 32  # bytes that tell an image
# What a NAS, a Mac, Windows and Linux put beside people's files. Hidden folders are passed over too.
_NOT_THE_USERS = {
    "@eadir",
    "#recycle",
    "@recycle",
    "__macosx",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}


# Extensions that say what else a file is: it is not opened, since there may be one beside each image.
_OTHERS = {
    "arrow", "avi", "avif", "cls", "csv", "dcm", "gz", "h5", "heic", "heif", "html", "j2k", "jp2", "json", "jsonl",
    "jxl", "md", "mkv", "mov", "mp4", "npy", "npz", "parquet", "pbm", "pdf", "pgm", "pnm", "ppm", "pt", "svg", "tar",
    "tsv", "txt", "webm", "xml", "yaml", "yml", "zip",
}  # fmt: skip


@dataclass
class LeftOut:
    """What a walk did not take."""

    files: Counter[str] = field(default_factory=Counter)  # by extension
    folders: Counter[str] = field(default_factory=Counter)  # by name
    bad: list[tuple[Path, str]] = field(default_factory=list)  # what might have been an image, and why it is none

    def __str__(self) -> str:
        """In a line; empty where nothing was left out."""
        kinds = [f"{count} {kind}" for kind, count in self.files.most_common()]
        folders = [f"{name} ({count})" if count > 1 else name for name, count in sorted(self.folders.items())]
        bad = [f"{as_text(path)} ({reason})" for path, reason in self.bad]
        parts = [
            f"{self.files.total()} files that are no images ({listed(kinds, limit=10)})" if kinds else "",
            f"folders {listed(folders)}" if folders else "",
            listed(bad),
        ]
        return "; ".join(part for part in parts if part)


def class_folders(folder: Path, left_out: LeftOut) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and those that no user made."""
    found = [entry for entry in _listing(folder, LeftOut()) if _is_folder(entry)]
    left_out.folders.update(as_text(entry.name) for entry in found if not _is_wanted(entry))
    return [folder / entry.name for entry in found if _is_wanted(entry)]


def images_in(folder: Path, left_out: LeftOut) -> list[Path]:
    """The images that lie in a folder itself; see `walk`."""
    files = (entry for entry in _listing(folder, left_out) if not _is_folder(entry))
    return [folder / entry.name for entry in files if _is_image(entry, left_out, ())]


def walk(folder: Path, left_out: LeftOut, also: Collection[str] = ()) -> Iterator[Path]:
    """The images in a folder and those below it; sorted, each folder's own before those below.

    An image is what has the extension of one (IMAGE_KINDS), or else the content, unless the extension names another
    format. also: further extensions that are wanted. Links are followed, except back to a folder they lie in; what
    several lead to is walked once. What is left out is added to `left_out` on the way.
    """
    place = folder.absolute()
    yield from _walk(folder, left_out, also, {_identity(each) for each in (place, *place.parents) if each.exists()})


def _walk(folder: Path, left_out: LeftOut, also: Collection[str], seen: set[tuple[int, int]]) -> Iterator[Path]:
    below = []
    for entry in _listing(folder, left_out):
        if not _is_folder(entry):
            if _is_image(entry, left_out, also):
                yield folder / entry.name
        elif _is_wanted(entry):
            below.append(entry)
        else:
            left_out.folders[as_text(entry.name)] += 1
    for entry in below:
        path = folder / entry.name
        if entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path)):
            left_out.folders[f"{as_text(entry.name)} that links back"] += 1
        elif (identity := _identity(path)) not in seen:
            seen.add(identity)
            yield from _walk(path, left_out, also, seen)


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _listing(folder: Path, left_out: LeftOut) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        left_out.bad.append((folder, f"cannot be read: {error.strerror}"))
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _is_wanted(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.name.lower() not in _NOT_THE_USERS


def _is_image(entry: os.DirEntry[str], left_out: LeftOut, also: Collection[str]) -> bool:
    """Whether a file is wanted; what is none is added to `left_out`."""
    if entry.name.startswith("."):
        left_out.files["hidden"] += 1
        return False
    path = Path(entry.path)
    extension = path.suffix[1:].lower()
    try:
        if not entry.is_file():
            left_out.bad.append((path, "is no regular file" if path.exists() else "is a broken link"))
            return False
        if extension in IMAGE_KINDS or extension in also or (extension not in _OTHERS and _is_image_inside(path)):
            return True
    except OSError as error:
        left_out.bad.append((path, f"cannot be read: {error.strerror}"))
        return False
    left_out.files[as_text(f".{extension}") if extension else "without an extension"] += 1
    return False


def _is_image_inside(path: Path) -> bool:
    with open(path, "rb") as stream:
        return image_kind(stream.read(HEAD)) is not None
