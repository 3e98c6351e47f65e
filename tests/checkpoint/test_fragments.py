from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.checkpoint.fragments import (
    Piece,
    PieceReader,
    Table,
    TensorRecord,
    copied,
    file_header,
    join_tables,
    new_memory,
)

DTYPES = ["float32", "float64", "float16", "int64", "uint8", "bool"]


def write_pieces(path: Path, pieces: list[Piece]) -> None:
    """As a rank's file has them: in one memory behind the header."""
    memory = []
    laid = copied(pieces, lambda count: memory.append(new_memory(count)) or memory[0])
    header, count = file_header(laid)
    path.write_bytes(header + memory[0][:count].tobytes())


@st.composite
def divided_tensors(draw):
    """Tensors, and their runs dealt out to files: [(name, array)], [[Piece, ...] for each file]."""
    files = [[] for _ in range(draw(st.integers(1, 4)))]
    tensors = []
    for number in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        array = (np.arange(prod(shape)) * 7 % 251).astype(draw(st.sampled_from(DTYPES))).reshape(shape)
        tensors.append((f"layer.{number}/weight@x", array))
        cuts = sorted({0, array.size, *draw(st.lists(st.integers(0, array.size), max_size=5))})
        runs = list(pairwise(cuts)) or [(0, 0)]
        for first, last in runs:
            piece = Piece("param", tensors[-1][0], shape, first, array.reshape(-1)[first:last])
            files[draw(st.integers(0, len(files) - 1))].append(piece)
    return tensors, files


@given(divided_tensors(), st.data())
@settings(max_examples=60)
def test_any_range_of_any_division_reads_back(divided, data):
    tensors, files = divided
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.safetensors" for number in range(len(files))]
        for path, pieces in zip(paths, files, strict=True):
            write_pieces(path, pieces)
        records = {record.name: record for record in join_tables([Table.of(pieces) for pieces in files])}
        reader = PieceReader(paths)
        for name, array in tensors:
            record = TensorRecord.from_json(records[name].as_json())
            assert (record.shape, record.dtype) == (array.shape, array.dtype.name)
            start = data.draw(st.integers(0, array.size))
            count = data.draw(st.integers(0, array.size - start))
            values = reader.read(record, start, count)
            np.testing.assert_array_equal(values, array.reshape(-1)[start : start + count], strict=True)


def pieces_of(*runs: tuple[int, int], shape=(2, 5), dtype="float32"):
    return [Piece("param", "w", shape, first, np.zeros(last - first, dtype)) for first, last in runs]


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ([pieces_of((0, 4)), pieces_of((5, 10))], r"param w \[2, 5\]: nothing holds elements 4 to 4"),
        ([pieces_of((0, 4)), pieces_of((4, 9))], "nothing holds elements 9 to 9"),
        ([pieces_of((1, 10))], "nothing holds elements 0 to 0"),
        ([pieces_of((0, 6)), pieces_of((4, 10))], "more than one piece holds elements 4 to 5"),
        ([pieces_of((0, 10)), pieces_of((0, 10))], "more than one piece holds elements 0 to 9"),
        ([pieces_of((0, 5)), pieces_of((5, 10), dtype="float64")], "float64"),
        ([pieces_of((0, 5)), pieces_of((5, 10), shape=(10,))], r"\(10,\)"),
    ],
)
def test_pieces_that_are_no_whole_tensor_are_named(tables, says):
    with pytest.raises(AssertionError, match=says):
        join_tables([Table.of(pieces) for pieces in tables])


def test_a_piece_must_lie_in_its_tensor():
    with pytest.raises(AssertionError, match="param w: a piece ends beyond 10"):
        pieces_of((6, 12))


def test_a_read_touches_only_the_files_that_hold_the_range(tmp_path):
    whole = [pieces_of((0, 4)), pieces_of((4, 10))]
    write_pieces(tmp_path / "0", whole[0])
    [record] = join_tables([Table.of(pieces) for pieces in whole])
    reader = PieceReader([tmp_path / "0", tmp_path / "not there"])
    assert reader.read(record, 1, 3).shape == (3,)
    with pytest.raises(FileNotFoundError):
        reader.read(record, 1, 4)
