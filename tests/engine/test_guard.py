from __future__ import annotations

import pytest

from vitscale.engine.guard import Diverged, SampleGuard, StepGuard
from vitscale.errors import DataError


def test_skipped_steps_in_a_row_end_the_run() -> None:
    guard = StepGuard(limit=3)
    for step, applied in enumerate([False, False, True, False, False]):
        guard.note(step, applied)
    assert guard.skipped == 4
    with pytest.raises(Diverged, match="3 steps in a row"):
        guard.note(5, applied=False)


def never() -> str:
    raise AssertionError("asked for before the limit")


def test_a_few_bad_samples_are_always_allowed() -> None:
    guard = SampleGuard(0.0, {})
    guard.note(["undecodable"] * 3, 100, never)
    reason = r"4 bad samples \(3 undecodable, 1 label\) among 200 .*fraction=0.0; one of them is s/k \(label"
    with pytest.raises(DataError, match=reason):
        guard.note(["label"], 200, lambda: "s/k (label: 'x' is no whole number)")


def test_counts_go_on_after_a_resume() -> None:
    guard = SampleGuard(0.01, {"undecodable": 9})
    guard.note(["undecodable"], 1000, never)
    assert guard.counts == {"undecodable": 10}
    with pytest.raises(DataError):
        guard.note(["undecodable"], 1000, lambda: "s/k")
