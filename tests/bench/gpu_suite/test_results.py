"""What the runner makes of a stage's lines, and what the results keep and say of them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.bench.gpu_suite.stages import make_setting, passing, unable
from tests.bench.gpu_suite.test_runner import LONG, SHORT, Run, case_states, run, stage, written
from vitscale.bench.gpu_suite.cases import Cases, Figures, Setting, Stage
from vitscale.bench.gpu_suite.results import Results
from vitscale.bench.gpu_suite.runner import _Watch
from vitscale.errors import VitscaleError

__all__ = ["run"]  # the fixture


def own(letter: str, name: str) -> Stage:
    return Stage(letter, name, f"{__name__}:{name}", LONG, LONG, 0)


def vanishing(setting: Setting) -> Cases:
    os._exit(3)


def partly(setting: Setting) -> Cases:
    return {**unable(setting), **passing(setting)}


def seeing(setting: Setting) -> Cases:
    return {"sees": lambda: {"text": str(setting.earlier["a"])}}


def repaired(setting: Setting) -> Cases:
    if not (setting.out.parent / "repaired").exists():
        raise ImportError("No module named 'tape'")
    return passing(setting)


def timed(setting: Setting) -> Cases:
    """What each case has of its time."""

    def tell() -> Figures:
        time.sleep(0.5)
        return {"left": setting.seconds_left()}

    return dict.fromkeys(("one", "two"), tell)


@pytest.fixture
def watch(tmp_path: Path) -> _Watch:
    stages = [stage("a", "passing")]
    setting = make_setting(tmp_path)
    setting.lines.touch()
    return _Watch(stages[0], setting, Results(tmp_path / "out", "cpu", stages))


def test_half_a_line_waits_for_its_other_half(watch: _Watch) -> None:
    with open(watch.setting.lines, "a") as stream:
        for part in ('{"begun": "one"}\n{"case": "one", "sta', 'te": "passed", "seconds": 1.0, "figures": {}}\n'):
            stream.write(part)
            stream.flush()
            watch._take_lines()
    assert case_states(watch.results, "a") == {"one": "passed"}


def test_notes_are_those_of_the_case_that_was_cut_off(watch: _Watch) -> None:
    watch.setting.emit(begun="one")
    watch.setting.note({"text": "of one"})
    watch.setting.emit(case="one", state="passed", figures={"text": "one"})
    watch.setting.emit(begun="two")
    watch._take_lines()
    watch._give_up("cut", "no time")
    assert watch.results.stage("a")["cases"]["two"]["figures"] is None
    watch.setting.emit(begun="three")
    watch.setting.note({"text": "of three"})
    watch._take_lines()
    watch._give_up("cut", "no time")
    assert watch.results.stage("a")["cases"]["three"]["figures"] == {"text": "of three"}
    assert "no time (so far: of three)" in watch.results.summary()


def test_a_process_that_ends_without_a_word_is_a_failure(run: Run) -> None:
    results = run(own("a", "vanishing"))
    assert results.state("a") == "failed"
    assert "its process ended with exit code 3" in results.summary()


def test_a_stage_passes_where_some_of_its_cases_can_run(run: Run) -> None:
    assert run(own("a", "partly")).state("a") == "passed"


@pytest.mark.parametrize(("limit", "case_limit", "budget", "has"), [
    (LONG, 100, 400, 100),  # the case's limit
    (100, LONG, 400, 100),  # the stage's
    (100, LONG, 960, 200),  # twice the budget that limits are for
])  # fmt: skip
def test_a_case_knows_when_it_will_be_ended(
    run: Run, limit: float, case_limit: float, budget: float, has: float
) -> None:
    results = run(Stage("a", "timed", f"{__name__}:timed", limit, case_limit, 0), stage("b", "passing"), budget=budget)
    left = [case["figures"]["left"] for case in results.stage("a")["cases"].values()]
    assert all(has - 30 < seconds <= has - 0.5 for seconds in left)


def test_the_last_stage_has_all_that_is_left(run: Run) -> None:
    """A limit leaves time to the stages after it."""
    results = run(stage("a", "passing"), Stage("b", "timed", f"{__name__}:timed", 50, LONG, 0), budget=200)
    assert results.stage("b")["cases"]["two"]["figures"]["left"] > 100


def test_later_stages_see_what_passed_alone(run: Run) -> None:
    results = run(stage("a", "failing"), own("b", "seeing"))
    assert results.figures()["b"]["sees"] == {"text": "{'after': {'text': 'after is well'}}"}
    assert "and more" not in results.summary(), "an error's first line is enough"


def test_the_budget_cuts_a_stage_short_of_its_limit(run: Run) -> None:
    results = run(stage("a", "hanging"), stage("b", "passing", least=0.1), budget=SHORT)
    assert case_states(results, "a") == {"before": "passed", "hangs": "cut"}
    assert results.stage("a")["cases"]["hangs"]["seconds"] > 0
    assert results.state("b") == "not run"


def test_reasons_are_gone_once_a_stage_has_run(run: Run, tmp_path: Path) -> None:
    stages = (own("a", "repaired"), stage("b", "passing", least=2 * LONG))
    first = run(*stages)
    assert (first.stage("a")["error"], first.stage("b")["left"]) != (None, None)
    seconds = first.stage("a")["seconds"]
    (tmp_path / "repaired").touch()
    second = run(*stages, budget=3 * LONG)
    assert [second.state(letter) for letter in "ab"] == ["passed"] * 2
    assert written(tmp_path)["a"]["error"] is written(tmp_path)["b"]["left"] is None
    assert second.stage("a")["seconds"] > seconds, "those of all calls"


def test_many_cases_together_stay_within_the_files_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too much is left out, what came before stays; a small case still fits."""
    monkeypatch.setattr("vitscale.bench.gpu_suite.results.MOST_RESULTS", 10_000)
    results = Results(tmp_path, "cpu", [stage("a", "passing")])
    for number in range(20):
        results.settle("a", f"case {number}", state="passed", figures={"numbers": [0] * 200})
    results.settle("a", "small", state="passed", figures={"text": "well"})
    results.write()
    kept = [bool(figures.get("numbers")) for figures in results.figures()["a"].values()]
    assert kept == sorted(kept, reverse=True)
    assert kept[0]
    assert "bytes of figures are too many for results.json" in results.summary()
    dropped = kept.count(False)
    assert (tmp_path / "results.json").stat().st_size < 10_000 + 300 * dropped


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(VitscaleError, match=r"OUT=.*file/out: cannot be made \(.*\); name a folder of your own"):
        Results(tmp_path / "file" / "out", "cpu", [])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(VitscaleError, match=r"results\.json: is not JSON \(.*\); name another OUT"):
        Results(tmp_path, "cpu", [])
