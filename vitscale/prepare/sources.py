"""What `vitscale pack` makes shards of: a folder of images, or a list of them; see also tables.py and shards.py."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from vitscale.errors import DataError
from vitscale.files.folder import LeftOut, class_folders, images_in, walk
from vitscale.files.header import FORMATS
from vitscale.files.retry import unreadable
from vitscale.prepare.progress import Progress, in_order, looked_at
from vitscale.prepare.writer import ImageFile, PackedSample
from vitscale.text import as_text, did_you_mean, listed

# Names of columns, in lower case and without _ or blanks.
PATHS = {"path", "file", "filename", "filepath", "image", "imagepath", "imagefile", "imagename", "img", "imgpath"}
LABELS = {"label", "labels", "class", "classname", "classlabel", "classid", "target", "category", "species", "y", "cls"}
_RELATIVE = "paths are relative to the list's folder"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
_DELIMITERS = (",", "\t", ";", "|")


@dataclass
class Columns:
    """The columns that a user names; else they are recognised."""

    image: str | None = None
    labels: tuple[str, ...] = ()


@dataclass
class Found:
    """The samples of a source."""

    samples: list[PackedSample]
    classes: Sequence[str] = ()  # names by label
    notes: list[str] = field(default_factory=list)  # what people should know of it


class Keys:
    """Names of samples, each given once."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}

    def of_path(self, path: str) -> str:
        """A path without its extension. A key ends at the first dot of the file's name, so dots become underscores."""
        folder, name = os.path.split(path)
        parts = [part for part in folder.split("/") if part not in ("", ".", "..")]
        stem = as_text("/".join([*parts, (os.path.splitext(name)[0] or name).replace(".", "_")]))
        return self.once(f"x{stem}" if stem.startswith("__") else stem)  # webdataset passes over names like __this__

    def once(self, key: str) -> str:
        """The key, with a number behind it where it was given before."""
        number = self._next.get(key, 1)
        self._next[key] = number + 1
        return key if number == 1 else self.once(f"{key}~{number}")

    def of_row(self, table: str, row: int) -> str:
        """For a row that has no name."""
        return self.of_path(f"{os.path.splitext(os.path.basename(table))[0]}-{row:08d}.row")


def from_folder(folder: Path, classes: Sequence[str] | None) -> Found:
    """The images of one folder a class, or of a flat folder, without labels."""
    left_out = LeftOut()
    folders, loose = class_folders(folder, left_out), images_in(folder, left_out)
    inside = _walked(folders, left_out)
    if loose and not any(inside.values()):  # such as OUT within it
        folders = []
    if not folders and not loose:
        raise DataError(f"{as_text(folder)}: holds no images ({', '.join(FORMATS)}){_but(left_out)}")
    if folders and loose:
        raise DataError(
            f"{as_text(folder)}: has images ({as_text(loose[0].name)}) beside folders ({as_text(folders[0].name)}): "
            "put all images into class folders, or all side by side"
        )
    if classes is not None and not folders:
        raise DataError(f"{as_text(folder)}: --classes: its images lie in no class folders; leave --classes out")
    _require_no_splits(folder, [each.name for each in folders], classes)
    names = [as_text(each.name) for each in folders] if classes is None else classes
    for each in folders:
        if as_text(each.name) not in names:
            raise DataError(f"{as_text(each)}: is none of the classes {listed(names)}; rename the folder or remove it")
        if not inside[each]:
            raise DataError(f"{as_text(each)}: is a class folder without images; fill or remove it{_but(left_out)}")
    labels = {name: str(label) for label, name in enumerate(names)}
    images: list[tuple[Path, str | None]] = [(path, None) for path in loose]
    images += [(path, labels[as_text(each.name)]) for each in folders for path in inside[each]]
    relative = [str(path.relative_to(folder)) for path, _ in images]
    samples, gone = _of_files(relative, [str(path) for path, _ in images], [label for _, label in images])
    if gone:
        raise DataError(f"{as_text(gone[0])}: went away while its folder was looked at; start again")
    notes = [f"{as_text(folder)}: left out: {left_out}"] if str(left_out) else []
    return Found(samples, names if folders else (), notes)


def _walked(folders: Sequence[Path], left_out: LeftOut) -> dict[Path, list[Path]]:
    """The images below each folder."""

    def below(some: Sequence[Path]) -> tuple[list[Path], LeftOut]:
        found, own = [], LeftOut()
        for path in walk(some[0], own):
            found.append(path)
            progress.add()
        return found, own

    inside = {}
    with Progress("pack: looking", "images so far") as progress:
        for folder, (found, own) in zip(folders, in_order(below, folders, part=1), strict=True):
            inside[folder] = found
            left_out.files.update(own.files)
            left_out.folders.update(own.folders)
            left_out.bad += own.bad
    return inside


def _of_files(
    names: Sequence[str], paths: Sequence[str], labels: Sequence[str | None]
) -> tuple[list[PackedSample], list[str]]:
    """Images by the names that their keys come of; and which of the paths are no files."""
    sizes = looked_at(_size, paths, "pack: sizes", "images")
    keys = Keys()
    samples = [
        PackedSample(keys.of_path(name), ImageFile(path), size or 0, label)
        for name, path, size, label in zip(names, paths, sizes, labels, strict=True)
    ]
    return samples, [path for path, size in zip(paths, sizes, strict=True) if size is None]


def _size(path: str) -> int | None:
    """The bytes of a file; None where there is none."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise unreadable(as_text(path), error) from None
    return stat.st_size if S_ISREG(stat.st_mode) else None


def _but(left_out: LeftOut) -> str:
    hints = {".tar": "shards as 'FOLDER/*.tar'", ".parquet": "Parquet files as 'FOLDER/*.parquet'",
             ".csv": "a list by its own name", ".tsv": "a list by its own name"}  # fmt: skip
    named = [hint for kind, hint in hints.items() if kind in left_out.files]
    return f"; left out: {left_out}{f'; name {named[0]}' if named else ''}" if str(left_out) else ""


def _require_no_splits(folder: Path, names: Sequence[str], classes: Sequence[str] | None) -> None:
    """DataError where the folders are a set's splits: ImageNet's root is no set of two classes."""
    splits = [name for name in names if name.lower() in SPLITS]
    if splits and (len(splits) == len(names) or len(splits) > 1) and not set(splits) <= set(classes or ()):
        raise splits_error(as_text(folder), splits)


def splits_error(folder: str, splits: Sequence[str]) -> DataError:
    """A set's folder in the place of one of its splits."""
    first, *others = splits
    way = f"`vitscale pack {folder}/{first} OUT/{first}`"
    if others:
        way += f", then `vitscale pack {folder}/{others[0]} OUT/{others[0]} --classes OUT/{first}/classes.json`"
    return DataError(
        f"{folder}: its folders {listed(splits)} are the splits of a set, not classes; pack each for itself: {way} "
        "(folders of classes that are called so are taken where --classes names them)"
    )


def from_list(path: Path, classes: Sequence[str] | None, columns: Columns) -> Found:
    """The images whose paths a CSV or TSV list has in a column, and their labels in others."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
            header, *rows = (row for row in csv.reader(stream, delimiter=delimiter) if row)
    except ValueError:
        raise DataError(f"{as_text(path)}: is empty; its first line names the columns, say path,label") from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{as_text(path)}: cannot be read as a list: {error}") from None
    header = [name.strip() for name in header]
    image = choose(header, PATHS, columns.image, str(path), "images' paths", "--image-column")
    if image is None:
        raise DataError(
            f"{as_text(path)}: has no column with the images' paths (such as path, file_name, image); its columns are "
            f"{listed(header)}: say which by --image-column, or begin the list with a line of names"
        )
    labels = choose_labels(header, columns.labels, str(path))
    places = [header.index(name) for name in (image, *labels)]
    for number, row in enumerate(rows, start=2):
        if len(row) <= max(places):
            raise DataError(
                f"{as_text(path)}: row {number} has {len(row)} columns, the line of names {len(header)}; mend it"
            )
        if not row[places[0]].strip():
            raise DataError(f"{as_text(path)}: row {number} has no path in {image!r}; mend it")
    paths = [row[places[0]].strip() for row in rows]
    cells = [[row[place].strip() for place in places[1:]] for row in rows]
    return from_paths(path, paths, cells, labels, classes)


def from_paths(
    path: Path,
    paths: Sequence[str],
    cells: Sequence[Sequence[object]],
    labels: Sequence[str],
    classes: Sequence[str] | None,
) -> Found:
    """The images at paths that a list has, relative to its folder; cells: of each one's columns with `labels`."""
    texts, names = numbered(cells, labels, classes, str(path))
    places = [os.path.join(path.parent, os.path.expanduser(relative)) for relative in paths]
    samples, missing = _of_files(paths, places, texts)
    if missing:
        is_url = "://" in missing[0]
        way = "URLs are not downloaded; img2dataset makes shards of them" if is_url else _RELATIVE
        raise DataError(
            f"{as_text(path)}: of its {len(paths)} images {len(missing)} are not there, the first as "
            f"{as_text(missing[0])}; {way}"
        )
    return Found(samples, names, [*label_notes(texts, labels, names), *_twice(paths)])


def _twice(paths: Sequence[str]) -> list[str]:
    """A note of images that are named more than once."""
    further = [path for path, count in Counter(paths).items() if count > 1]
    if not further:
        return []
    return [
        f"{len(further)} images are named more than once ({as_text(further[0])}), and packed as often, on one side "
        "of --held-out; data.validation_fraction, which goes by keys, would part them"
    ]


def label_notes(texts: Sequence[str | None], labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Where the labels of a table come from, by their columns and the names of classes that they come to: what was
    recognised may not be what is meant."""
    if not labels:
        return ["no labels are taken: no column is called label or the like; --label-column names one"]
    missing = sum(text is None for text in texts)
    notes = [
        f"labels are those of {listed(labels)}{f'; {missing} of {len(texts)} images have none' if missing else ''}"
    ]
    numbers = [name for name in names if _is_number(name)]
    if 0 < len(numbers) < len(names):
        notes += [f"warning: its labels are words and numbers ({listed(numbers, 3)}): each is taken for a class's name"]
    return notes


def plain(name: str) -> str:
    """A column's name for comparing."""
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")


def choose(
    names: Sequence[str], known: Iterable[str], named: str | None, source: str, what: str, option: str
) -> str | None:
    """The column that is named, or the one that has a known name; None where there is none."""
    if named is not None:
        if named not in names:
            raise DataError(
                f"{option} {named}: {as_text(source)} has no such column{did_you_mean(named, names)}; "
                f"its columns are {listed(names, limit=20)}"
            )
        return named
    likely = [name for name in names if plain(name) in known]
    if len(likely) > 1:
        raise DataError(f"{as_text(source)}: {what} may be in {listed(likely)}; say where by {option}")
    return likely[0] if likely else None


def choose_labels(names: Sequence[str], named: Sequence[str], source: str, known: Iterable[str] = LABELS) -> list[str]:
    """The columns with labels; none where there are none."""
    option = "--label-column"
    each: Sequence[str | None] = named or [None]
    return [name for one in each if (name := choose(names, known, one, source, "labels", option)) is not None]


def numbered(
    cells: Sequence[Sequence[object]], labels: Sequence[str], classes: Sequence[str] | None, source: str
) -> tuple[list[str | None], Sequence[str]]:
    """Labels as they are written (None: an image has none), and the classes' names by their numbers.

    Numbers stay as they are; other words are names of classes, numbered as in `classes` or in sorted order. Several
    columns are several numbers, and name them.
    """
    rows = [[_text(cell) for cell in row] for row in cells]
    if len(labels) > 1:
        for row in rows:
            if wrong := [text for text in row if text and not _is_number(text)]:
                raise DataError(f"{as_text(source)}: several columns with labels hold a number each, not {wrong[0]!r}")
        return [" ".join(text or "0" for text in row) if any(row) else None for row in rows], classes or labels
    texts = [row[0] or None if row else None for row in rows]
    words = {text for text in texts if text}
    if all(map(_is_number, words)):
        return texts, classes or ()
    names = sorted(words) if classes is None else classes
    if others := sorted(words - set(names)):
        raise DataError(f"{as_text(source)}: the label {others[0]!r} is none of the classes {listed(names)}")
    places = {name: str(place) for place, name in enumerate(names)}
    return [text and places[text] for text in texts], names


def _text(cell: object) -> str:
    """A cell as it is written; "" for what stands for none."""
    if isinstance(cell, list):
        return " ".join(map(_text, cell))
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, bytes):
        cell = os.fsdecode(cell)
    return as_text(str(int(cell) if isinstance(cell, bool) else cell)).strip()


def _is_number(text: str) -> bool:
    try:
        list(map(float, text.split()))
    except ValueError:
        return False
    return True
