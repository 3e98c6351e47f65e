"""The suite's runner with small stages in real processes: what one loses, another keeps."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitscale.bench.gpu_suite.cases import Stage
from vitscale.bench.gpu_suite.results import MOST_STAGE_LOG, Results
from vitscale.bench.gpu_suite.runner import Runner
from vitscale.errors import VitscaleError

Run = Callable[..., Results]
SHORT = 3.0  # seconds that are waited for: enough for a process and small cases on a busy machine
LONG = 300.0  # more than any test takes


def stage(letter: str, name: str, limit: float = LONG, case_limit: float = LONG, least: float = 0) -> Stage:
    return Stage(letter, f"the {name} one", f"tests.bench.gpu_suite.stages:{name}", limit, case_limit, least)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run(stage, ..., budget=, device=) -> the results; the same OUT each time."""

    def go(*stages: Stage, budget: float = LONG, device: str = "cpu", letters: str | None = None) -> Results:
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        results = Results(tmp_path / "out", device, stages)
        Runner(results, device, scratch, budget).run(letters or [one.letter for one in stages])
        return results

    return go


def case_states(results: Results, letter: str) -> dict[str, str]:
    return {name: case["state"] for name, case in results.stage(letter)["cases"].items()}


def times_run(tmp_path: Path) -> list[str]:
    return (tmp_path / "ran").read_text().split()


def has_ended(process: int) -> bool:
    """It is gone or a zombie; it gets some time for that."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(200):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def written(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "results.json").read_text())["stages"]


def test_stages_give_figures_to_those_after_them(run: Run, tmp_path: Path) -> None:
    results = run(stage("a", "passing"), stage("b", "earlier"))
    assert (results.state("a"), results.state("b")) == ("passed", "passed")
    assert written(tmp_path)["b"]["cases"]["sees"]["figures"] == {"text": "one is well"}
    assert "the passing one" in (tmp_path / "out" / "summary.txt").read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # forked, and a fresh Python
def test_a_crash_costs_its_own_case_only(run: Run, tmp_path: Path, device: str) -> None:
    results = run(stage("a", "crashing"), stage("b", "passing"), device=device)
    assert case_states(results, "a") == {"before": "passed", "crashes": "failed", "after": "passed"}
    assert results.state("a") == "failed"
    assert "signal 9" in results.stage("a")["cases"]["crashes"]["error"]
    assert "what it printed" in (tmp_path / "out" / "log.txt").read_text()
    assert results.state("b") == "passed"
    assert times_run(tmp_path) == ["before", "after", "one", "two"]


def test_a_failure_is_told_in_a_line_and_the_rest_goes_on(run: Run, tmp_path: Path) -> None:
    results = run(stage("a", "failing"))
    assert case_states(results, "a") == {"fails": "failed", "after": "passed"}
    assert "ValueError: 3 is not 4" in results.summary()
    assert "and more" in (tmp_path / "out" / "log.txt").read_text()


def test_a_hanging_case_is_ended_with_its_children_and_keeps_its_notes(run: Run, tmp_path: Path) -> None:
    results = run(stage("a", "hanging", case_limit=SHORT))
    assert case_states(results, "a") == {"before": "passed", "hangs": "failed", "after": "passed"}
    hung = results.stage("a")["cases"]["hangs"]
    assert hung["error"] == "took more than 3 s and was ended"
    assert hung["figures"] == {"text": "half of it"}
    assert has_ended(int((tmp_path / "scratch" / "child").read_text()))


def test_the_stages_limit_cuts_it_and_the_next_one_runs(run: Run) -> None:
    results = run(stage("a", "hanging", limit=SHORT), stage("b", "passing"))
    assert case_states(results, "a") == {"before": "passed", "hangs": "cut"}
    assert results.state("a") == "cut"
    assert re.search(r"^ +after +not run$", results.summary(), re.MULTILINE)
    assert results.state("b") == "passed"


def test_what_does_not_fit_the_budget_is_listed(run: Run, tmp_path: Path) -> None:
    results = run(stage("a", "passing"), stage("b", "passing", least=2 * LONG))
    assert (results.state("a"), results.state("b")) == ("passed", "not run")
    assert "of the budget were left, it needs 600" in results.summary()
    assert written(tmp_path)["b"]["left"]


def test_a_second_call_does_what_is_left(run: Run, tmp_path: Path) -> None:
    """What was never begun comes first, then what failed or was cut; what passed is not repeated."""
    stages = (stage("a", "mended"), stage("b", "slow", limit=SHORT), stage("c", "passing", least=2 * LONG))
    first = run(*stages)
    assert [first.state(letter) for letter in "abc"] == ["failed", "cut", "not run"]
    (tmp_path / "mended").touch()
    (tmp_path / "ran").unlink()
    patient = (stages[0], stage("b", "slow"), stages[2])
    second = run(*patient, budget=3 * LONG)
    assert [second.state(letter) for letter in "abc"] == ["passed"] * 3
    assert times_run(tmp_path) == ["one", "two", "last"]
    (tmp_path / "ran").unlink()
    assert [run(*patient).state(letter) for letter in "abc"] == ["passed"] * 3
    assert not (tmp_path / "ran").exists()


def test_what_had_too_little_time_keeps_its_figures_and_is_tried_again(run: Run, tmp_path: Path) -> None:
    results = run(stage("a", "hurried"))
    assert case_states(results, "a") == {"halves": "cut", "after": "passed"}
    assert results.state("a") == "cut"
    assert "no time left for the second half (so far: the first half)" in results.summary()
    (tmp_path / "mended").touch()
    assert run(stage("a", "hurried")).figures()["a"]["halves"] == {"text": "both halves"}
    assert times_run(tmp_path) == ["after"]


def test_a_machine_that_cannot_says_why(run: Run) -> None:
    results = run(stage("a", "unable"))
    assert results.state("a") == "cannot"
    assert "no tape drive here" in results.summary()
    assert results.in_order("a") == []


def test_a_stage_whose_modules_are_missing_fails(run: Run) -> None:
    results = run(stage("a", "missing"), stage("b", "passing"))
    assert results.state("a") == "failed"
    assert "No module named 'tape'" in results.summary()
    assert results.state("b") == "passed"


def test_files_stay_small(run: Run, tmp_path: Path) -> None:
    results = run(stage("a", "large"), stage("b", "talking"))
    assert case_states(results, "a") == {"large": "passed", "after": "passed"}
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert set(sizes) == {"results.json", "summary.txt", "log.txt"}
    assert max(sizes.values()) < 2 * MOST_STAGE_LOG
    assert (tmp_path / "out" / "log.txt").read_text().rstrip().endswith("the end")


def test_only_the_asked_stages_run(run: Run) -> None:
    results = run(stage("a", "passing"), stage("b", "passing"), letters="b")
    assert (results.state("a"), results.state("b")) == ("not run", "passed")


def test_results_of_another_device_are_not_mixed(run: Run, tmp_path: Path) -> None:
    run(stage("a", "passing"))
    with pytest.raises(VitscaleError, match=r"on cpu, not of .* on cuda; name another OUT"):
        Results(tmp_path / "out", "cuda", [stage("a", "passing")])


def test_logs_of_many_calls_keep_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale.bench.gpu_suite.results.MOST_LOG", 1000)
    results = Results(tmp_path, "cpu", [])
    for number in range(50):
        results.add_log("a", b"z" * 100 + f" call {number}\n".encode())
        assert (tmp_path / "log.txt").stat().st_size <= 1000
    assert (tmp_path / "log.txt").read_text().endswith(" call 49\n")
    assert os.listdir(tmp_path) == ["log.txt"]
