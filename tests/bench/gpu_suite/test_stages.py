"""What the stages make of what they measure, where a rehearsal cannot show it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.bench.gpu_suite.stages import make_setting
from vitscale.bench.gpu_suite import gpu_tests, sharding, steps
from vitscale.bench.gpu_suite.__main__ import STAGES
from vitscale.bench.gpu_suite.cases import Mismatch, Unable
from vitscale.bench.gpu_suite.pretraining import _agree


def test_first_losses_of_the_zero_stages_must_agree() -> None:
    known = {"ZeRO-0": [1.5, 1.4, 1.3, 1.2, 1.1, 1.0]}
    _agree("ZeRO-2", [1.501, 1.399, 1.301, 1.2, 1.1, 9.9], known)  # the sixth is no first loss
    for wrong in ([1.5, 1.4, 1.3, 1.2, 1.2], [float("nan")] * 5):
        with pytest.raises(Mismatch, match="ZeRO-2: the loss of step"):
            _agree("ZeRO-2", wrong, known)


def test_every_size_is_measured_before_peers_are_compiled() -> None:
    names = list(steps.cases(make_setting(Path(), "cuda")))
    first = ["mae L", "classification L", "mae B", "classification B", "mae H", "classification H"]
    assert names == [*first, *(f"{name}, all" for name in first)]


def test_sharding_is_measured_size_by_size() -> None:
    names = list(sharding.cases(make_setting(Path(), "cuda")))
    assert names[:5] == ["B DDP", "B ZeRO-2", "B FSDP2", "B ZeRO-3", "B ZeRO-1"]
    assert [name.split()[0] for name in names[:20:5]] == ["B", "L", "H", "g"]
    again = [f"{size}, gradient checkpointing" for size in ("L", "B", "H")]
    assert names[20:] == [f"{size} {name}" for size in again for name in ("DDP", "ZeRO-2", "ZeRO-3", "ZeRO-1")]


@pytest.mark.parametrize(("line", "found"), [
    ("tests/gpu/test_a.py::test_b[one two] PASSED       [ 16%]", ("tests/gpu/test_a.py::test_b[one two]", "PASSED")),
    ("tests/gpu/test_a.py::test_b SKIPPED (no NVIDIA...) [ 9%]", ("tests/gpu/test_a.py::test_b", "SKIPPED")),
    ("tests/gpu/test_a.py::test_b FAILED", ("tests/gpu/test_a.py::test_b", "FAILED")),
    ("tests/gpu/test_a.py:38: AssertionError", None),
])  # fmt: skip
def test_pytests_lines_are_understood(line: str, found: tuple[str, str] | None) -> None:
    outcome = gpu_tests._OUTCOME.match(line)
    assert (outcome.groups() if outcome else None) == found


def test_without_pytest_its_stage_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a .venv that is only for runs."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unable, match="pytest is not installed"):
        gpu_tests.cases(make_setting(Path(), "cuda"))["pytest"]()


def test_every_test_that_needs_a_gpu_is_run() -> None:
    tests = Path(__file__).parents[2]
    marked = {path for path in tests.rglob("*.py") if "pytest.mark.gpu" in path.read_text()} - {Path(__file__)}
    places = [tests.parent / place for place in gpu_tests.PLACES]
    assert len(marked) > 4
    assert [path for path in marked if not any(path.is_relative_to(place) for place in places)] == []


@pytest.mark.parametrize("outcomes", [["SKIPPED", "SKIPPED"], ["SKIPPED", "PASSED"]])
def test_tests_that_all_were_skipped_are_no_pass(
    outcomes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("\n".join(["#!/bin/sh", *(f"echo tests/test_a.py::test_b {one}" for one in outcomes)]))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    run = gpu_tests.cases(make_setting(tmp_path, "cuda"))["pytest"]
    if "PASSED" in outcomes:
        assert run()["text"] == "1 passed, 1 skipped"
    else:
        with pytest.raises(Unable, match="no test could run: 2 were skipped"):
            run()


def test_the_first_stages_fit_the_budget() -> None:
    """At their limits, the two that matter most leave room for the third to begin; a case never outlives its stage."""
    assert sum(stage.limit_s for stage in STAGES[:2]) + STAGES[2].least_s < 480
    assert all(stage.case_limit_s < stage.limit_s for stage in STAGES)
