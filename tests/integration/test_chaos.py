"""Trials of `vitscale chaos`; all of them by the command itself (docs/faults.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitscale.launch.breaking import KINDS
from vitscale.launch.chaos import chaos, planned
from vitscale.launch.trials import SAVED_EVERY

LONG = ("rank hangs", "asked twice", "bit flipped", "gradients not finite", "MLflow down")


@pytest.mark.parametrize("kind", ["killed in a save", *(pytest.param(kind, marks=pytest.mark.full) for kind in LONG)])
def test_runs_that_are_broken_end_as_one_that_was_not(tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    (outcome,) = chaos(tmp_path, planned([kind], 1), seed=0, say=said.append).values()
    assert (outcome.passed, outcome.faults) == (1, KINDS[kind].faults), said
    assert all(0 <= lost <= 3 * SAVED_EVERY for lost in outcome.lost_steps)
    assert len(outcome.back_s) == len(outcome.detect_s)
