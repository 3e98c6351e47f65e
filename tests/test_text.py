"""What is said to people, on any terminal."""

from __future__ import annotations

import io
import sys

import pytest

from vitscale.text import aligned, did_you_mean, duration, listed, printable, tolerate_any_text


def test_listed_names_a_few() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5 and 6 more"
    assert listed([], 3) == ""


def test_hints_end_a_message_or_are_empty() -> None:
    assert did_you_mean("train.step", ["train.steps", "data.train"]) == "; did you mean train.steps?"
    assert did_you_mean("qwxz", ["train.steps"]) == ""


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([["name", "n"], ["a", "100"]], right=[1]) == "name    n\na     100"


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (42, "42s"), (425, "7m05s"), (12000, "3h20m"), (187200, "2d04h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_what_would_move_the_cursor_is_escaped() -> None:
    assert printable("caf\u00e9 \u732b") == "caf\u00e9 \u732b"
    assert printable("a\n\x1b[2J\udce9") == "a\\n\\x1b[2J\\udce9"


def test_output_takes_what_its_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    tolerate_any_text()
    print("\u732b", flush=True)
    assert written.getvalue() == b"\\u732b\n"
