from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.errors import DataError
from vitscale.tracking.jsonl import JsonlFile, JsonlTail, as_number


def filled(path, count=10):
    file = JsonlFile(path)
    for step in range(1, count + 1):
        file.append({"step": step, "loss": 1 / step})
    return file


@given(st.floats())
@settings(max_examples=200)
def test_every_float_comes_back_to_the_bit(tmp_path_factory, value):
    file = JsonlFile(tmp_path_factory.mktemp("floats") / "metrics.jsonl")
    file.append({"step": 1, "loss": value, "nested": {"values": [value]}})
    json.loads(file.path.read_text(), parse_constant=pytest.fail)  # NaN and Infinity as bare words are not JSON
    [row] = file.rows()
    for read in (as_number(row["loss"]), as_number(row["nested"]["values"][0])):
        assert read == value or (math.isnan(read) and math.isnan(value))
        assert math.copysign(1, read) == math.copysign(1, value) or math.isnan(value)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        ("Infinity", math.inf),
        ("-Infinity", -math.inf),
        (True, None),
        ("3", None),
        (None, None),
        ([1], None),
    ],
)
def test_as_number(value, number):
    assert as_number(value) == number


def test_rows_of_no_file(tmp_path):
    assert JsonlFile(tmp_path / "none.jsonl").rows() == []


@pytest.mark.parametrize("whole", [0, 2])
def test_a_row_after_a_torn_one_is_a_line_of_its_own(tmp_path, whole):
    file = filled(tmp_path / "attempts.jsonl", whole)
    with open(file.path, "ab") as stream:
        stream.write(b'{"step": 3, "lo')
    file.append({"step": 4})
    assert [row["step"] for row in file.rows()] == [*range(1, whole + 1), 4]


def test_cut_back_drops_later_rows_and_the_torn_end(tmp_path):
    file = filled(tmp_path / "metrics.jsonl")
    file.append({"note": "of no step"})
    with open(file.path, "ab") as stream:
        stream.write(b'{"step": 3, "lo')
    assert len(file.rows()) == 11
    file.cut_back(4)
    assert [row.get("step") for row in file.rows()] == [1, 2, 3, 4, None]
    file.append({"step": 5})
    assert file.rows()[-1] == {"step": 5}
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", range(1, len('{"step": 5, "loss": 0.2}\n')))
def test_a_row_torn_anywhere(tmp_path, torn):
    file = filled(tmp_path / "metrics.jsonl", 5)
    file.path.write_bytes(file.path.read_bytes()[:-torn])
    whole = 5 if torn == 1 else 4  # only the line's end is missing: the row is there
    assert len(file.rows()) == whole
    file.cut_back(5)
    assert [row["step"] for row in file.rows()] == list(range(1, whole + 1))
    file.append({"step": 6})
    assert [row["step"] for row in file.rows()][-1] == 6


def test_cut_back_with_nothing_to_cut_leaves_the_file_alone(tmp_path):
    file = filled(tmp_path / "metrics.jsonl")
    before = file.path.stat()
    file.cut_back(10)
    JsonlFile(tmp_path / "none.jsonl").cut_back(0)
    assert file.path.stat().st_ino == before.st_ino
    file.cut_back(0)
    assert file.rows() == []


def test_garbage_in_the_middle_is_named_and_cut(tmp_path):
    file = filled(tmp_path / "metrics.jsonl", 3)
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(lines[0] + b"\0\0\0\xff\n" + b"[1]\n" + lines[1])
    with pytest.raises(DataError, match=r"metrics.jsonl:2: is no JSON object"):
        file.rows()
    file.cut_back(10)
    assert [row["step"] for row in file.rows()] == [1, 2]


def test_the_tail_gives_each_row_once_and_starts_over_when_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = JsonlTail(path)
    assert tail.peek() is None
    file = filled(path, 3)
    with open(path, "ab") as stream:
        stream.write(b'{"step": 4')  # being written
    rows, end = tail.peek()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert tail.peek() == (rows, end)  # until they are taken
    tail.take(end)
    assert tail.peek() is None
    with open(path, "ab") as stream:
        stream.write(b"}\n")
    assert tail.peek()[0] == [{"step": 4}]
    file.cut_back(2)
    assert [row["step"] for row in tail.peek()[0]] == [1, 2]


def test_the_tail_goes_in_bounded_parts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path, 100)
    tail, seen = JsonlTail(path), []
    while (found := tail.peek(at_most=200)) is not None:
        assert len(found[0]) < 12
        seen += found[0]
        tail.take(found[1])
    assert [row["step"] for row in seen] == list(range(1, 101))
