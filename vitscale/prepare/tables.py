"""Images in tables, for `vitscale pack`: Parquet files, and what the `datasets` library saved to disk (Arrow files)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Number
from pathlib import Path
from typing import Any

from vitscale.errors import DataError
from vitscale.prepare.progress import looked_at
from vitscale.prepare.sources import (
    LABELS,
    PATHS,
    Columns,
    Found,
    Keys,
    choose,
    choose_labels,
    from_paths,
    label_notes,
    numbered,
    plain,
)
from vitscale.prepare.writer import ImageFile, Members, PackedSample, image_extension
from vitscale.text import as_text, first_sentence, listed

_ROWS = 64  # of a Parquet file, in memory at once
_READ_AHEAD = 1 << 20  # bytes


@dataclass(frozen=True)
class _Layout:
    """Which columns of a table hold what."""

    image: str
    image_bytes: str  # the column with the bytes, as Parquet names it; "": there are paths alone
    image_path: str  # the column with the paths; "": there is none
    labels: tuple[str, ...]
    names: tuple[str, ...] | None  # of the classes, as the table's own features have them


@dataclass(frozen=True, slots=True)
class TableRow:
    """An image in a row of a Parquet or an Arrow file."""

    path: str
    group: int  # the row group of a Parquet file; -1: an Arrow file
    row: int  # in its group
    column: str

    def read(self) -> tuple[str, Members]:
        with _errors_of(self.path):
            if self.group < 0:
                value = _arrow_table(self.path).column(self.column)[self.row].as_py()
            else:
                value = _rows(self.path, self.group, self.column, os.getpid()).value(self.row)
        data, place = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            kind = image_extension(place or "", data)
            return kind, {kind: data}
        if place:
            return ImageFile(os.path.join(os.path.dirname(self.path), place)).read()
        raise DataError(f"{as_text(self.path)}: row {self.row} has no image in {self.column}; filter such rows out")


@contextlib.contextmanager
def _errors_of(path: str | Path) -> Iterator[None]:
    """What pyarrow raises, as a DataError."""
    import pyarrow as arrow

    try:
        yield
    except DataError:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{as_text(path)}: cannot be read: {first_sentence(str(error))}") from None


def from_parquet(paths: Sequence[Path], classes: Sequence[str] | None, columns: Columns) -> Found:
    """The images of Parquet files, as bytes or as paths relative to their folders."""
    import pyarrow.parquet as parquet

    _rows.cache_clear()  # a file may have changed since
    with _errors_of(paths[0]):
        layout = _layout(parquet.read_schema(paths[0]), str(paths[0]), columns)
    wanted = [*([layout.image_path] if layout.image_path else []), *layout.labels]

    def read(path: Path) -> tuple[Any, list[tuple[int, int]]]:
        with _errors_of(path), parquet.ParquetFile(path) as file:
            if missing := {layout.image, *layout.labels} - set(file.schema_arrow.names):
                raise DataError(f"{as_text(path)}: has no column {listed(sorted(missing))}, which {paths[0]} has")
            return file.read(columns=wanted, use_threads=False), _row_groups(file.metadata, layout.image_bytes)

    tables, sizes = zip(*looked_at(read, paths, "pack: looking", "files"), strict=True)
    if not layout.image_bytes:
        return _of_paths(paths, tables, layout, classes)
    keys, samples, place = Keys(), [], 0
    names = [name for table in tables for name in _paths(table, layout)]
    cells = [row for table in tables for row in _cells(table, layout)]
    texts, found = _labels(cells, layout, classes, str(paths[0]))
    for path, groups in zip(paths, sizes, strict=True):
        first = place
        for group, (rows, size) in enumerate(groups):
            for row in range(rows):
                key = keys.of_path(name) if (name := names[place]) else keys.of_row(path.name, place - first)
                origin = TableRow(str(path), group, row, layout.image)
                samples.append(PackedSample(key, origin, size, texts[place], f"{path.name} {group}"))
                place += 1
    return Found(samples, found, [*label_notes(texts, layout.labels, found), *_vector_notes(cells, layout)])


def saved_splits(folder: Path) -> list[str]:
    """The splits that a saved DatasetDict has: folders."""
    try:
        return list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{as_text(folder)}: is no data set of save_to_disk: {error}") from None


def from_saved(folder: Path, classes: Sequence[str] | None, columns: Columns) -> Found:
    """The images of a data set that `datasets` saved to disk: its Arrow files, which state.json lists."""
    import pyarrow.compute as compute

    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        paths = [folder / file["filename"] for file in state["_data_files"]]
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{as_text(folder)}: is no data set of save_to_disk: {error}") from None
    samples: list[PackedSample] = []
    keys = Keys()
    _arrow_table.cache_clear()  # a file may have changed since
    with _errors_of(folder):
        tables = [_arrow_table(str(path)) for path in paths]
    layout = _layout(tables[0].schema, as_text(folder), columns, info.get("features"))
    cells = [row for table in tables for row in _cells(table, layout)]
    texts, names = _labels(cells, layout, classes, as_text(folder))
    if not layout.image_bytes:
        return _of_paths(paths, tables, layout, classes)
    for path, table in zip(paths, tables, strict=True):
        column = table.column(layout.image)
        data = compute.struct_field(column, "bytes") if layout.image_bytes != layout.image else column
        sizes = compute.binary_length(data).to_pylist()
        for row, (name, size) in enumerate(zip(_paths(table, layout), sizes, strict=True)):
            key = keys.of_path(name) if name else keys.of_row(path.name, row)
            origin = TableRow(str(path), -1, row, layout.image)
            samples.append(PackedSample(key, origin, size or 0, texts[len(samples)]))
    return Found(samples, names, [*label_notes(texts, layout.labels, names), *_vector_notes(cells, layout)])


def _of_paths(paths: Sequence[Path], tables: Sequence[Any], layout: _Layout, classes: Sequence[str] | None) -> Found:
    """A table that is a list of paths."""
    if len({path.parent for path in paths}) > 1:
        raise DataError(f"{as_text(paths[0])}: lists of paths must lie in one folder, as {paths[-1]} does not")
    names = [name or "" for table in tables for name in _paths(table, layout)]
    if "" in names:
        raise DataError(f"{as_text(paths[0])}: row {names.index('')} has no path in {layout.image}; take it out")
    cells = [row for table in tables for row in _cells(table, layout)]
    found = from_paths(paths[0], names, cells, layout.labels, classes)
    found.notes += _vector_notes(cells, layout)
    return found


def _layout(schema: Any, source: str, columns: Columns, features: Any = None) -> _Layout:
    """What the columns of a table are: by the features that `datasets` keeps, else by their types and names."""
    if features is None:
        kept = json.loads((schema.metadata or {}).get(b"huggingface") or b"{}")
        features = kept.get("info", {}).get("features") or {}
    kinds = {name: _feature(feature) for name, feature in features.items() if name in schema.names}
    image = _image_column(schema, source, columns, [name for name, (kind, _) in kinds.items() if kind == "Image"])
    known = {plain(name) for name, (kind, _) in kinds.items() if kind == "ClassLabel"} or LABELS
    labels = choose_labels([name for name in schema.names if name != image], columns.labels, source, known)
    names = kinds.get(labels[0], ("", None))[1] if len(labels) == 1 else None
    inside, data = _inside(schema.field(image).type), _bytes_of(schema.field(image))
    path = f"{image}.path" if "path" in inside else "" if data else image
    return _Layout(image, data, path, tuple(labels), names)


def _image_column(schema: Any, source: str, columns: Columns, images: Sequence[str]) -> str:
    """The column with images or their paths. images: those that are known to be such."""
    option = "--image-column"
    images = images or [field.name for field in schema if _bytes_of(field) and plain(field.name) not in LABELS]
    if len(images) > 1 and columns.image is None:
        raise DataError(f"{source}: images may be in {listed(images)}; say where by {option}")
    if images and columns.image is None:
        return images[0]
    texts = [field.name for field in schema if str(field.type) in ("string", "large_string")]
    image = choose(schema.names if columns.image else texts, PATHS, columns.image, source, "images' paths", option)
    if image is None or (image not in texts and not _bytes_of(schema.field(image))):
        names = listed(schema.names, limit=20)
        raise DataError(f"{source}: has no column with images or their paths; its columns are {names}: say by {option}")
    return image


def _feature(feature: Any) -> tuple[str, tuple[str, ...] | None]:
    """What a feature of `datasets` holds, alone or in a list, and the names of its classes."""
    if isinstance(feature, list) and feature:
        return _feature(feature[0])
    if not isinstance(feature, dict):
        return "", None
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return _feature(feature.get("feature"))
    return str(feature.get("_type")), tuple(feature["names"]) if feature.get("names") else None


def _bytes_of(field: Any) -> str:
    """The column, as Parquet names it, with an image's bytes; "" where there is none."""
    if str(field.type) in ("binary", "large_binary"):
        return field.name
    return f"{field.name}.bytes" if "bytes" in _inside(field.type) else ""


def _inside(kind: Any) -> list[str]:
    """The names in a struct; none in another type."""
    return [kind.field(place).name for place in range(kind.num_fields)] if str(kind).startswith("struct<") else []


def _paths(table: Any, layout: _Layout) -> list[str | None]:
    if not layout.image_path:
        return [None] * len(table)
    column = table.column(layout.image)
    if layout.image_path != layout.image:
        import pyarrow.compute as compute

        column = compute.struct_field(column, "path")
    return column.to_pylist()


def _cells(table: Any, layout: _Layout) -> list[list[object]]:
    columns = [table.column(name).to_pylist() for name in layout.labels]
    if layout.names is None:
        columns = [[_vector(cell) for cell in column] for column in columns]
    return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in range(len(table))]


def _vector(cell: Any) -> Any:
    """A list of numbers with each in its place: where one is missing, nan, with which no run takes it for a label."""
    if not isinstance(cell, list):
        return cell
    known = [each for each in cell if each is not None and each == each]
    if not known or not isinstance(known[0], Number):
        return known
    return ["nan" if each is None or each != each else each for each in cell]


def _vector_notes(cells: Sequence[Sequence[Any]], layout: _Layout) -> list[str]:
    """What people should know of labels that are lists of numbers."""
    if layout.names is not None or len(layout.labels) != 1:
        return []
    (name,), lists = layout.labels, [row[0] for row in cells if isinstance(row[0], list)]
    vectors = [each for each in lists if any(isinstance(number, Number) for number in each)]
    notes, sizes = [], sorted({len(each) for each in vectors})
    if len(sizes) > 1:
        notes.append(
            f"warning: {name} has lists of {listed(sizes)} numbers, and a run takes as many of each image "
            "(model.num_labels): of several classes an image write 0 or 1 for each class"
        )
    if lacking := sum("nan" in each for each in vectors):
        notes.append(f"warning: of {lacking} images {name} lacks a number: a run takes them for bad samples")
    return notes


def _labels(
    cells: Sequence[Sequence[object]], layout: _Layout, classes: Sequence[str] | None, source: str
) -> tuple[list[str | None], Sequence[str]]:
    """As `numbered`; numbers of classes that the table names are numbers of those of `classes`, if these are given."""
    names = layout.names
    if names is None:
        return numbered(cells, layout.labels, classes, source)
    of_rows = [_numbers(row[0]) for row in cells]
    if wrong := [number for numbers in of_rows for number in numbers if number >= len(names)]:
        raise DataError(f"{source}: the label {wrong[0]} is none of its {len(names)} classes")
    if any(isinstance(row[0], list) for row in cells):  # several classes an image: 1 for each that is there
        return [" ".join(str(int(place in numbers)) for place in range(len(names))) for numbers in of_rows], names
    if classes is None:
        return [str(numbers[0]) if numbers else None for numbers in of_rows], names
    return numbered([[names[number] for number in numbers] for numbers in of_rows], layout.labels, classes, source)


def _numbers(cell: Any) -> list[int]:
    """Of the classes in a cell; -1 stands for none."""
    return [number for number in (cell if isinstance(cell, list) else [cell]) if number is not None and number >= 0]


def _row_groups(metadata: Any, column: str) -> list[tuple[int, int]]:
    """Of each row group, its rows, and the bytes of an image among them in the mean."""
    groups = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(place) for place in range(group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
        groups.append((group.num_rows, -(-size // max(1, group.num_rows))))
    return groups


class _Rows:
    """The rows of one row group, of which few are in memory; asked for in ascending order."""

    def __init__(self, path: str, group: int, column: str) -> None:
        import pyarrow.parquet as parquet

        self._file = parquet.ParquetFile(path, buffer_size=_READ_AHEAD)
        self._group, self._column = group, column
        self._batches: Iterator[Any] = iter(())
        self._values: Any = ()
        self._start = 0  # of these values

    def value(self, row: int) -> Any:
        if row < self._start or not len(self._values):
            self._batches = self._file.iter_batches(_ROWS, [self._group], [self._column], use_threads=False)
            self._start, self._values = 0, next(self._batches).column(0)
        while row >= self._start + len(self._values):
            self._start += len(self._values)
            self._values = next(self._batches).column(0)
        return self._values[row - self._start].as_py()


@lru_cache(maxsize=1)
def _rows(path: str, group: int, column: str, process: int) -> _Rows:
    """`process`: an open file's position is not shared with one that is forked."""
    return _Rows(path, group, column)


@lru_cache(maxsize=64)
def _arrow_table(path: str) -> Any:
    """An Arrow file, mapped and not read."""
    import pyarrow as arrow

    return arrow.ipc.open_stream(arrow.memory_map(path)).read_all()
