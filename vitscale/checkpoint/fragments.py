"""Runs of named tensors: what each rank writes, whether they cover every tensor, and reading any range back.

No torch: values are NumPy arrays, files are safetensors. A tensor is addressed flat: element i of
a run that starts at s is element s + i of the C-ordered tensor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vitscale.text import listed


@dataclass(frozen=True)
class Piece:
    """A run of one tensor's elements that one rank gives to a checkpoint."""

    kind: str  # param, exp_avg, exp_avg_sq, ema, frozen, buffer
    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # of this run in the flattened tensor
    values: np.ndarray  # 1-D

    def __post_init__(self) -> None:
        size = prod(self.shape)
        assert self.values.ndim == 1, f"{self.kind} {self.name}: a piece is 1-D, not {self.values.shape}"
        assert 0 <= self.start <= size - self.values.size, f"{self.kind} {self.name}: a piece ends beyond {size}"


@dataclass(frozen=True)
class Location:
    """Where a run of a tensor's elements lies."""

    file: int  # place in the checkpoint's list of files
    start: int  # first element
    count: int


@dataclass(frozen=True)
class TensorRecord:
    """What a checkpoint says of one tensor."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str  # NumPy's name
    pieces: tuple[Location, ...]  # in order of start

    @property
    def size(self) -> int:
        return prod(self.shape)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "pieces": [[piece.file, piece.start, piece.count] for piece in self.pieces],
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> TensorRecord:
        return TensorRecord(
            content["kind"],
            content["name"],
            tuple(content["shape"]),
            content["dtype"],
            tuple(Location(*piece) for piece in content["pieces"]),
        )

    def covering(self, start: int, count: int) -> Iterator[tuple[Location, int, int]]:
        """The pieces that hold elements [start, start + count), with the part of each: first, last (exclusive)."""
        at = bisect_right(self.pieces, start, key=lambda piece: piece.start) - 1
        for piece in self.pieces[max(at, 0) :]:
            if piece.start >= start + count:
                return
            yield piece, max(start - piece.start, 0), min(start + count - piece.start, piece.count)


def entry_name(kind: str, name: str, start: int) -> str:
    """What a piece is called inside its safetensors file."""
    return f"{kind}/{name}@{start}"


def write_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    """Write the pieces of one rank as one safetensors file; raises OSError or SafetensorError."""
    save_file(
        {entry_name(p.kind, p.name, p.start): np.ascontiguousarray(p.values) for p in pieces if p.values.size}, path
    )


def table(pieces: Iterable[Piece]) -> list[list[Any]]:
    """What one rank tells the others of its pieces: JSON-able rows (kind, name, shape, dtype, start, count)."""
    return [[p.kind, p.name, list(p.shape), p.values.dtype.name, p.start, p.values.size] for p in pieces]


def join_tables(tables: Sequence[list[list[Any]]]) -> list[TensorRecord]:
    """The tensors that all files' tables make up, sorted by kind and name.

    Asserts that every tensor is given with one shape and dtype, and each of its elements exactly once.
    """
    meant: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    pieces: dict[tuple[str, str], list[Location]] = {}
    wrong = []
    for file, rows in enumerate(tables):
        for kind, name, shape, dtype, start, count in rows:
            described = (tuple(shape), dtype)
            if meant.setdefault((kind, name), described) != described:
                wrong.append(f"{kind} {name}: is {described} and {meant[kind, name]}")
            pieces.setdefault((kind, name), [])
            if count:
                pieces[kind, name].append(Location(file, start, count))
    records = [
        TensorRecord(*key, *meant[key], tuple(sorted(pieces[key], key=lambda piece: piece.start)))
        for key in sorted(meant)
    ]
    wrong += [fault for record in records if (fault := _gap_or_overlap(record))]
    assert not wrong, f"pieces do not make up whole tensors: {listed(wrong)}"
    return records


def _gap_or_overlap(record: TensorRecord) -> str | None:
    position = 0
    for piece in (*record.pieces, Location(-1, record.size, 0)):
        if piece.start != position:
            what = "nothing holds" if piece.start > position else "more than one piece holds"
            first, last = sorted((piece.start, position))
            return f"{record.kind} {record.name} {list(record.shape)}: {what} elements {first} to {last - 1}"
        position += piece.count
    return None


class PieceReader:
    """Reads ranges of tensors from a checkpoint's files; those that it opened stay mapped."""

    def __init__(self, files: Sequence[Path]):
        self._paths = files
        self._opened: dict[int, Any] = {}

    def read(self, record: TensorRecord, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) of a tensor, 1-D; touches no other bytes than these."""
        assert 0 <= start <= start + count <= record.size, f"{record.name}: {start}+{count} lies beyond {record.size}"
        values = np.empty(count, dtype=np.dtype(record.dtype))
        if count == 0:
            return values
        for piece, first, last in record.covering(start, count):
            content = self._open(piece.file).get_slice(entry_name(record.kind, record.name, piece.start))
            at = piece.start + first - start
            values[at : at + last - first] = content[first:last]
        return values

    def _open(self, file: int) -> Any:
        if file not in self._opened:
            self._opened[file] = safe_open(self._paths[file], framework="numpy")
        return self._opened[file]
