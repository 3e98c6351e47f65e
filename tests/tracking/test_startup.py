"""The parts of a start, on one rank and of several."""

from __future__ import annotations

import time

import pytest

from vitscale.tracking.startup import StartUp, as_line, slowest


def test_parts_add_up_to_the_time_since_the_process_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    startup = StartUp()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for part, moment in (("imports", now + 1.0), ("index", now + 3.0), ("index", now + 3.5)):
        now = moment
        startup.done(part)
    startup.end("first step")
    now += 100.0
    startup.end("first step")  # of later steps nothing counts
    assert list(startup.seconds) == ["imports", "index", "first step"]
    assert startup.seconds["imports"] > 1.0  # the process is older than this test
    assert startup.seconds["index"] == pytest.approx(2.5)
    assert startup.seconds["first step"] == 0.0


def test_the_slowest_rank_is_told_where_it_differs() -> None:
    of_ranks = [{"imports": 2.0, "joining": 1.0}, {"imports": 5.0, "joining": 0.9}, {"imports": 2.1, "joining": 1.2}]
    assert as_line(of_ranks) == "start-up: 3.0 s to the end of the first step: imports 2.0 (rank 1: 5.0), joining 1.0"
    assert slowest(of_ranks) == {"imports": 5.0, "joining": 1.2}
