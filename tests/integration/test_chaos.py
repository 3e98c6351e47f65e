"""A few trials of `vitscale chaos`; all kinds, and many of each, by the command itself (docs/faults.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitscale.launch.chaos import chaos
from vitscale.launch.trials import SAVED_EVERY


@pytest.mark.parametrize("kind", ["killed in a save", pytest.param("rank hangs", marks=pytest.mark.full)])
def test_runs_that_are_broken_end_as_one_that_was_not(tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    outcomes = chaos(tmp_path, [kind], 1, seed=0, say=said.append)
    assert [(each.passed, each.faults) for each in outcomes.values()] == [(1, 1)], said
    assert all(0 <= lost <= 2 * SAVED_EVERY for each in outcomes.values() for lost in each.lost_steps)
    assert all(len(each.back_s) == 1 for each in outcomes.values())
