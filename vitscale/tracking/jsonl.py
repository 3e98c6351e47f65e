"""A file of JSON lines that grows by whole lines: the record of a run, and the spool that MLflow is fed from.

Floats are written with all their digits. JSON has no NaN and no infinities: such a float is written as
the text "NaN", "Infinity" or "-Infinity", which float() reads back (see `as_number`).
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vitscale.errors import DataError
from vitscale.files.atomic import replaced

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class JsonlFile:
    """Rows (dicts) as lines of one file. One process writes; others may read at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Write one row as one line, handed to the kernel on return: it outlives this process's SIGKILL."""
        line = json.dumps(as_json(row), allow_nan=False, ensure_ascii=False) + "\n"
        with open(self.path, "a+b") as stream:
            _drop_torn_line(stream)
            stream.write(line.encode())

    def sync(self) -> None:
        """Hand the rows to the disk: call before a checkpoint that must not know more than they do."""
        if self.path.exists():
            with open(self.path, "rb") as stream:
                os.fsync(stream.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All rows; none where there is no file. A torn last line is no row; DataError on any other that is none."""
        rows = []
        for number, line in enumerate(_lines(self.path), start=1):
            row = parse_row(line)
            if row is not None:
                rows.append(row)
            elif line.endswith(b"\n"):
                raise DataError(f"{self.path}:{number}: is no JSON object; remove that line")
        return rows

    def last(self) -> dict[str, Any] | None:
        """The newest whole row."""
        rows = map(parse_row, reversed(deque(_lines(self.path), maxlen=2)))  # the last line may be torn
        return next((row for row in rows if row is not None), None)

    def cut_back(self, step: int) -> None:
        """Drop rows with a `step` above this one and lines that are no rows, in one atomic replacement."""
        if all(line.endswith(b"\n") and _is_kept(line, step) for line in _lines(self.path)):
            return
        with replaced(self.path) as draft, open(draft, "wb") as stream:
            stream.writelines(line.rstrip(b"\n") + b"\n" for line in _lines(self.path) if _is_kept(line, step))


class JsonlTail:
    """Rows as they come: what was appended to a file since the last `take`.

    Starts over from the first row when the file was replaced (`cut_back` does that).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None  # device and inode
        self._taken = 0  # bytes

    def peek(self, at_most: int = 1 << 20) -> tuple[list[dict[str, Any]], int] | None:
        """(rows after those taken, position to `take` them), of about `at_most` bytes; None where none are new."""
        rows: list[dict[str, Any]] = []
        if not self._path.exists():
            return None
        with open(self._path, "rb") as stream:
            found = os.fstat(stream.fileno())
            if self._file != (found.st_dev, found.st_ino) or found.st_size < self._taken:
                self._file, self._taken = (found.st_dev, found.st_ino), 0
            stream.seek(self._taken)
            end = self._taken
            for line in stream:
                if not line.endswith(b"\n") or end - self._taken > at_most:
                    break
                end += len(line)
                if (row := parse_row(line)) is not None:
                    rows.append(row)
        return (rows, end) if end > self._taken else None

    def take(self, position: int) -> None:
        """The rows up to a position that `peek` told are done with."""
        self._taken = position

    def rewind(self) -> None:
        """Start over from the first row."""
        self._taken = 0


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds, or None."""
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError, UnicodeDecodeError
        return None
    return row if isinstance(row, dict) else None


def _is_kept(line: bytes, step: int) -> bool:
    row = parse_row(line)
    return row is not None and row.get("step", step) <= step


def as_number(value: Any) -> float | None:
    """A row's value as a float, NaN and infinities included, or None where it is no number."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in NOT_FINITE):
        return None
    return float(value)


def _drop_torn_line(stream: BinaryIO) -> None:
    """What a full disk or a power cut has left of a line, which the next one would be glued to."""
    end = stream.seek(0, os.SEEK_END)
    if end == 0:
        return
    stream.seek(-1, os.SEEK_END)
    if stream.read(1) == b"\n":
        return
    stream.seek(0)
    whole = sum(len(line) for line in stream if line.endswith(b"\n"))
    stream.truncate(whole)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as stream:
            yield from stream
    except FileNotFoundError:
        return


def as_json(value: Any) -> Any:
    """`value` with floats that JSON lacks as text: see `as_number`."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value
