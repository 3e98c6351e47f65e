"""Turns, ratios and tables of the benchmarks."""

from __future__ import annotations

import json
import statistics
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.bench.rounds import fastest, figures, first_line, in_turns, report, report_sections

SECONDS = st.floats(1e-6, 1e6)


def test_turns_go_there_and_back_and_then_begin_with_another() -> None:
    taken: list[str] = []

    def measure(name: str) -> int:
        taken.append(name)
        return len(taken)

    results = in_turns({name: partial(measure, name) for name in "abc"}, 5)
    assert "".join(taken) == "abccbabcaacbcab"
    assert results == {"a": [1, 6, 9, 10, 14], "b": [2, 5, 7, 12, 15], "c": [3, 4, 8, 11, 13]}


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=9))
def test_a_ratio_is_of_times_of_the_same_round(rounds: list[tuple[float, float]]) -> None:
    ours, peers = (list(times) for times in zip(*rounds, strict=True))
    result = figures({"ours": ours, "peer": peers}, "peer")
    assert result["peer"]["ratio"] == 1
    ratios = [peer / own for own, peer in rounds]
    assert result["ours"]["ratio"] == statistics.median(ratios)
    assert result["ours"]["ratio_spread"] == [min(ratios), max(ratios)]
    assert result["ours"]["median_ms"] == pytest.approx(statistics.median(ours) * 1000)
    slower = [time * 2 for time in ours]
    assert figures({"ours": slower, "peer": peers}, "peer")["ours"]["ratio"] <= result["ours"]["ratio"]


def test_the_fastest_is_one_of_those_named_that_were_measured() -> None:
    seconds = {"ours": [1.0], "slow": [3.0, 2.0, 9.0], "fast": [2.0, 2.5, 2.6]}
    assert fastest(seconds, ("slow", "fast", "left out")) == "fast"
    assert fastest(seconds, ("left out",)) is None


def test_a_report_is_a_table_and_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    contenders = {
        "ours": {"rate": 12.34, "ratio": 2.0, "ratio_spread": [1.5, 2.5]},
        "without a peer": {"rate": 1.0, "ratio": None},
    }
    result = {"contenders": contenders, "left_out": {"another": "ImportError: no module"}}
    report("What it is", {"images/s": "{rate:.1f}"}, result)
    assert capsys.readouterr().out.splitlines() == [
        "What it is",
        "                images/s                 ratio",
        "ours                12.3  2.000 (1.50 to 2.50)",
        "without a peer       1.0",
        "another is left out: ImportError: no module",
        json.dumps(result),
    ]


def test_sections_are_one_line_with_all_that_they_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    sections = {
        "images": {"contenders": {}, "left_out": {"DALI": "not installed"}},
        "storage": {"contenders": {}, "left_out": {"S3": "no server"}},
        "shards": {"ms_within": 1.0},
    }
    report_sections({"bench": "data"}, sections)
    left_out = {"DALI": "not installed", "S3": "no server"}
    assert json.loads(capsys.readouterr().out) == {"bench": "data", "sections": sections, "left_out": left_out}


def test_a_reason_is_one_line() -> None:
    assert first_line(ValueError("\n3 is not 4\nand more")) == "ValueError: 3 is not 4"
    assert first_line(KeyError()) == "KeyError: "
