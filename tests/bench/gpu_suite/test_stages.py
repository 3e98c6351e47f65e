"""What the stages make of what they measure, where a rehearsal cannot show it."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.gpu_suite.stages import make_setting
from vitscale.bench.gpu_suite import gpu_tests, sharding, steps
from vitscale.bench.gpu_suite.__main__ import STAGES
from vitscale.bench.gpu_suite.cases import USUAL_BUDGET_S, Mismatch, Unable, Unfinished
from vitscale.bench.gpu_suite.pretraining import _agree
from vitscale.bench.peers import GRAPHED, WITH_COMPILED


def test_first_losses_of_the_zero_stages_must_agree() -> None:
    known = {"ZeRO-0": [1.5, 1.4, 1.3, 1.2, 1.1, 1.0]}
    _agree("ZeRO-2", [1.501, 1.399, 1.301, 1.2, 1.1, 9.9], known)  # the sixth is no first loss
    for wrong in ([1.5, 1.4, 1.3, 1.2, 1.2], [float("nan")] * 5):
        with pytest.raises(Mismatch, match="ZeRO-2: the loss of step"):
            _agree("ZeRO-2", wrong, known)


def test_steps_are_measured_size_by_size_with_each_compiled_peer_in_a_case_of_its_own() -> None:
    cases: Any = steps.cases(make_setting(Path(), "cuda"))
    names = list(cases)
    assert names[:6] == [f"{objective} B{peer}" for peer in ("", ", transformers compiled", ", timm compiled")
                         for objective in ("mae", "classification")]  # fmt: skip
    assert [name.split()[1].rstrip(",") for name in names[:18:6]] == ["B", "L", "H"]
    assert all(GRAPHED in name for name in names[18:])
    assert len(set(names)) == 18 + 12
    contenders = {f"{library} {how}" for library, how in WITH_COMPILED}
    assert contenders - {name for case in cases.values() for name in case.args[2]} == {"vitscale eager"}
    assert all(set(case.args[2]) < contenders for case in cases.values())


def test_a_contender_without_time_leaves_its_case_unfinished(tmp_path: Path) -> None:
    setting = make_setting(tmp_path, "cpu", a={"matrix": {"tflops": 1.0}})
    setting.case_deadline = time.monotonic()
    with pytest.raises(Unfinished, match="no time left for vitscale eager, transformers eager"):
        steps.cases(setting)["mae Ti"]()


def test_sharding_begins_with_what_a_user_takes() -> None:
    """DDP and ZeRO-2 at each size with and without checkpointing, before FSDP2 and the other stages of any."""
    names = list(sharding.cases(make_setting(Path(), "cuda")))
    again = "gradient checkpointing"
    assert names[:4] == ["B DDP", "B ZeRO-2", f"B, {again} DDP", f"B, {again} ZeRO-2"]
    assert [name[0] for name in names[:12]] == [size for size in "BLH" for _ in range(4)]
    assert {name.split()[-1] for name in names[:12]} == {"DDP", "ZeRO-2"}
    assert names[12:15] == [f"{size}, selective checkpointing DDP" for size in "BLH"]
    assert len(names) == 35
    assert not any("FSDP2" in name and "checkpointing" in name for name in names)
    assert [name for name in names if name[0] == "g"] == [f"g {name}" for name in (*sharding.FIRST, *sharding.OTHERS)]


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
    assert sum(stage.limit_s for stage in STAGES[:2]) + STAGES[2].least_s < USUAL_BUDGET_S
    assert all(stage.case_limit_s < stage.limit_s for stage in STAGES)
