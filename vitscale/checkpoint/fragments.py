"""Runs of named tensors: what each rank writes, whether they cover every tensor, and reading any range back.

No torch: values are NumPy arrays, files are safetensors. A tensor is addressed flat: element i of
a run that starts at s is element s + i of the C-ordered tensor.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vitscale.errors import CheckpointError
from vitscale.text import listed

Reserve = Callable[[int], np.ndarray]  # bytes -> uint8 [at least as many]
DTYPES = {  # NumPy's names -> safetensors'
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}


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
class Stretch:
    """Pieces of equal size that follow each other in a tensor and lie in consecutive files, as ZeRO-3 divides it."""

    file: int  # of the first piece
    count: int  # elements of each piece
    files: int


@dataclass(frozen=True)
class TensorRecord:
    """What a checkpoint says of one tensor."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str  # NumPy's name
    stretches: tuple[Stretch, ...]  # they make up the tensor, from its first element on

    @property
    def size(self) -> int:
        return prod(self.shape)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "pieces": [[each.file, each.count, each.files] for each in self.stretches],
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> TensorRecord:
        return TensorRecord(
            content["kind"],
            content["name"],
            tuple(content["shape"]),
            content["dtype"],
            tuple(Stretch(*row) for row in content["pieces"]),
        )

    def covering(self, start: int, count: int) -> Iterator[tuple[Location, int, int]]:
        """The pieces that hold elements [start, start + count), with the part of each: first, last (exclusive)."""
        position, end = 0, start + count
        for each in self.stretches:
            skipped = min(max(start - position, 0) // each.count, each.files)
            for number in range(skipped, each.files):
                at = position + number * each.count
                if at >= end:
                    return
                yield Location(each.file + number, at, each.count), max(start - at, 0), min(end - at, each.count)
            position += each.count * each.files

    def within(self, file: int) -> Iterator[Location]:
        """The pieces that lie in one file."""
        position = 0
        for each in self.stretches:
            if each.file <= file < each.file + each.files:
                yield Location(file, position + (file - each.file) * each.count, each.count)
            position += each.count * each.files


def entry_name(kind: str, name: str, start: int) -> str:
    """What a piece is called inside its safetensors file."""
    return f"{kind}/{name}@{start}"


# ---- writing


def new_memory(count: int) -> np.ndarray:
    """The Reserve of what is not shared with another process."""
    return np.empty(count, dtype=np.uint8)


def arrays_in(reserve: Reserve, needed: Sequence[tuple[np.dtype[Any], int]]) -> list[np.ndarray]:
    """Arrays of these types and lengths, yet to be filled, without gaps in one memory."""
    places, position = [0] * len(needed), 0
    for number in sorted(range(len(needed)), key=lambda number: -needed[number][0].itemsize):  # so that all are aligned
        places[number] = position
        position += needed[number][0].itemsize * needed[number][1]
    memory = reserve(position)
    return [
        memory[place : place + dtype.itemsize * count].view(dtype)
        for place, (dtype, count) in zip(places, needed, strict=True)
    ]


def copied(pieces: Iterable[Piece], reserve: Reserve) -> list[Piece]:
    """The same pieces in one memory."""
    given = list(pieces)
    arrays = arrays_in(reserve, [(piece.values.dtype, piece.values.size) for piece in given])
    for piece, array in zip(given, arrays, strict=True):
        array[:] = piece.values
    return [Piece(p.kind, p.name, p.shape, p.start, array) for p, array in zip(given, arrays, strict=True)]


def file_header(pieces: Sequence[Piece]) -> tuple[bytes, int]:
    """What stands before the values in a safetensors file, and how many bytes of values follow.

    The pieces lie without gaps in one memory, as `arrays_in` gives it: that memory is the rest of the file.
    """
    entries, position = {}, 0
    lying = sorted((piece for piece in pieces if piece.values.size), key=lambda piece: piece.values.ctypes.data)
    for piece in lying:
        values, end = piece.values, position + piece.values.nbytes
        assert values.ctypes.data - lying[0].values.ctypes.data == position, f"{piece.name}: a gap before this piece"
        entries[entry_name(piece.kind, piece.name, piece.start)] = {
            "dtype": DTYPES[values.dtype.name],
            "shape": [values.size],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, position


# ---- what all ranks' pieces make up


@dataclass(frozen=True)
class Table:
    """What one rank tells of its pieces."""

    digest: str  # of `tensors`
    tensors: list[list[Any]] | None  # (kind, name, shape, dtype) of each piece; None where a lower rank's are the same
    starts: list[int]
    counts: list[int]

    @staticmethod
    def of(pieces: Sequence[Piece]) -> Table:
        tensors = [[p.kind, p.name, list(p.shape), p.values.dtype.name] for p in pieces]
        digest = hashlib.sha256(json.dumps(tensors).encode()).hexdigest()[:16]
        return Table(digest, tensors, [p.start for p in pieces], [p.values.size for p in pieces])


def join_tables(tables: Sequence[Table]) -> list[TensorRecord]:
    """The tensors that all files' tables make up, sorted by kind and name.

    Asserts that every tensor is given with one shape and dtype, and each of its elements exactly once.
    """
    meant: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    wrong = []
    distinct = {table.digest: table.tensors for table in tables if table.tensors is not None}
    for tensors in distinct.values():
        for kind, name, shape, dtype in tensors:
            described = (tuple(shape), dtype)
            if meant.setdefault((kind, name), described) != described:
                wrong.append(f"{kind} {name}: is {described} and {meant[kind, name]}")
    keys = sorted(meant)
    number = {key: place for place, key in enumerate(keys)}
    numbers = {
        digest: np.array([number[kind, name] for kind, name, *_ in tensors], np.int64)
        for digest, tensors in distinct.items()
    }
    sizes = np.array([prod(meant[key][0]) for key in keys], np.int64)
    pieces = _Columns.of(tables, [numbers[table.digest] for table in tables])
    stretches = pieces.stretches(len(keys))
    records = [TensorRecord(*key, *meant[key], tuple(stretches[place])) for place, key in enumerate(keys)]
    wrong += [_gap_or_overlap(records[place], pieces.of_tensor(place)) for place in pieces.faulty(sizes)]
    assert not wrong, f"pieces do not make up whole tensors: {listed(wrong)}"
    return records


@dataclass(frozen=True)
class _Columns:
    """All ranks' pieces, in order of their tensors and starts: int64 arrays of one length."""

    tensor: np.ndarray
    start: np.ndarray
    count: np.ndarray
    file: np.ndarray

    @staticmethod
    def of(tables: Sequence[Table], tensors: Sequence[np.ndarray]) -> _Columns:
        columns = (
            np.concatenate([*tensors, np.empty(0, np.int64)]),
            np.concatenate([np.array(table.starts, np.int64) for table in tables]),
            np.concatenate([np.array(table.counts, np.int64) for table in tables]),
            np.repeat(np.arange(len(tables)), [len(table.counts) for table in tables]),
        )
        order = np.lexsort((columns[1], columns[0]))
        order = order[columns[2][order] > 0]
        return _Columns(*(column[order] for column in columns))

    def faulty(self, sizes: np.ndarray) -> list[int]:
        """The tensors that pieces do not make up exactly."""
        ends = self.start + self.count
        expected = np.concatenate([[0], ends[:-1]])
        expected[np.diff(self.tensor, prepend=-1) != 0] = 0
        reached = np.zeros_like(sizes)
        reached[self.tensor] = ends  # of the last piece: a later one overwrites
        broken = set(self.tensor[self.start != expected].tolist())
        return sorted(broken | set(np.flatnonzero(reached != sizes).tolist()))

    def of_tensor(self, place: int) -> list[Location]:
        first, last = np.searchsorted(self.tensor, [place, place + 1])
        rows = (column[first:last].tolist() for column in (self.file, self.start, self.count))
        return [Location(*row) for row in zip(*rows, strict=True)]

    def stretches(self, tensors: int) -> list[list[Stretch]]:
        """By tensor; of pieces that follow each other."""
        begins = np.ones(len(self.tensor), dtype=bool)
        begins[1:] = (np.diff(self.tensor) != 0) | (np.diff(self.count) != 0) | (np.diff(self.file) != 1)
        first = np.flatnonzero(begins)
        lengths = np.diff(first, append=len(begins))
        result: list[list[Stretch]] = [[] for _ in range(tensors)]
        rows = (column[first].tolist() for column in (self.tensor, self.file, self.count))
        for tensor, file, count, files in zip(*rows, lengths.tolist(), strict=True):
            result[tensor].append(Stretch(file, count, files))
        return result


def _gap_or_overlap(record: TensorRecord, pieces: Sequence[Location]) -> str:
    position = 0
    for piece in (*pieces, Location(-1, record.size, 0)):
        if piece.start != position:
            break
        position += piece.count
    what = "nothing holds" if piece.start > position else "more than one piece holds"
    first, last = sorted((piece.start, position))
    return f"{record.kind} {record.name} {list(record.shape)}: {what} elements {first} to {last - 1}"


# ---- reading


class PieceReader:
    """Reads ranges of tensors from a checkpoint's files; those that it opened stay mapped."""

    def __init__(self, files: Sequence[Path]):
        self._paths = files
        self._opened: dict[int, Any] = {}

    def read(self, record: TensorRecord, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) of a tensor, 1-D; touches no other bytes than these.

        Raises CheckpointError where a file does not hold what the record says.
        """
        assert 0 <= start <= start + count <= record.size, f"{record.name}: {start}+{count} lies beyond {record.size}"
        values = np.empty(count, dtype=np.dtype(record.dtype))
        if count == 0:
            return values
        for piece, first, last in record.covering(start, count):
            at = piece.start + first - start
            values[at : at + last - first] = self._entry(record, piece)[first:last]
        return values

    def check(self, file: int, records: Iterable[TensorRecord]) -> None:
        """CheckpointError where a file does not hold the pieces that these records say. Reads its header alone."""
        for record in records:
            for piece in record.within(file):
                self._entry(record, piece)

    def _entry(self, record: TensorRecord, piece: Location) -> Any:
        """What is to be sliced for the values of a piece, which has as many of its type."""
        path, name = self._paths[piece.file], entry_name(record.kind, record.name, piece.start)
        try:
            if piece.file not in self._opened:
                self._opened[piece.file] = safe_open(path, framework="numpy")
            entry = self._opened[piece.file].get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} cannot be read ({' '.join(str(error).split())})") from None
        found = (entry.get_dtype(), entry.get_shape())
        if found != (DTYPES[record.dtype], [piece.count]):
            raise CheckpointError(f"{path.name} has {found} as {name!r}, and {piece.count} {record.dtype} were written")
        return entry
