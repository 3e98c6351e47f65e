"""What `vitscale chaos` compares and counts, and a trial of it; all kinds by the command itself (docs/faults.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitscale.errors import ConfigError
from vitscale.launch.chaos import KINDS, Outcome, as_table, chaos, goodput, run_trials
from vitscale.launch.trials import SAVED_EVERY, STEPS, Ground, differences, newest_checkpoint
from vitscale.run_folder import RunFolder


def made(path: Path) -> RunFolder:
    """The folder of a run that has ended."""
    (path / "checkpoints" / f"step_{STEPS:08d}").mkdir(parents=True)
    (path / "model").mkdir()
    (path / "model" / "model.safetensors").write_bytes(b"weights")
    steps = range(1, STEPS + 1)
    rows = {
        "metrics.jsonl": [{"step": step, "loss": 1 / step} for step in steps],
        "trace.jsonl": [{"step": step, "sample_keys": [f"a/{step}"]} for step in steps],
    }
    for name, each in rows.items():
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in each))
    return RunFolder(path)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    ground = Ground(tmp_path, 2)
    made(ground.unbroken.path)
    return ground


def spoil(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_an_equal_run(ground: Ground, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    assert differences(ground, run, same_world=True) == []
    assert newest_checkpoint(run) == STEPS


def test_every_difference_is_found(ground: Ground, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    spoil(run.metrics, '"loss": 0.25}', '"loss": 0.2500000001}')
    assert differences(ground, run, same_world=True) == ["the loss differs from step 4 on"]
    assert differences(ground, run, same_world=False) == []
    spoil(run.metrics, '"loss": 0.2500000001}', '"loss": 0.2501}')
    assert differences(ground, run, same_world=False) == ["the loss differs from step 4 on"]

    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([*lines[:3], *lines[4:]]))
    assert "steps are missing or twice in metrics.jsonl" in differences(ground, run, same_world=True)
    run.metrics.write_text("".join([*lines, lines[-1]]))
    assert "steps are missing or twice in metrics.jsonl" in differences(ground, run, same_world=True)

    spoil(run.path / "trace.jsonl", '"a/7"', '"a/8"')
    (run.model / "model.safetensors").write_bytes(b"others")
    (run.checkpoints / ".tmp-step_00000001").mkdir()
    found = differences(ground, run, same_world=True)
    assert found[-3:] == [
        "other samples were trained on (trace.jsonl)",
        "the final weights differ",
        "left in checkpoints: .tmp-step_00000001",
    ]


def test_what_the_trials_came_to() -> None:
    outcomes = {"rank killed": Outcome(2, 1, 6, [1.0, 3.0], [4], [10.0, 50.0, 20.0])}
    line = as_table(outcomes).splitlines()[1]
    assert " ".join(line.split()) == "rank killed 1 of 2 6 2.0 (at most 3.0) 4.0 (at most 4.0) 20.0 (at most 50.0)"
    assert goodput(outcomes) == pytest.approx(1 - (20 + 300) / (3 * 3600))
    assert goodput({"reader killed": Outcome(1, 1, 1)}) is None


def test_an_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="--kinds 'fire': must be of 'rank killed'"):
        run_trials(["fire"], None, 0)
    assert len(KINDS) == 11


@pytest.mark.parametrize("kind", ["killed in a save", pytest.param("rank hangs", marks=pytest.mark.full)])
def test_runs_that_are_broken_end_as_one_that_was_not(tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    outcomes = chaos(tmp_path, [kind], 1, seed=0, say=said.append)
    assert [(each.passed, each.faults) for each in outcomes.values()] == [(1, 1)], said
    assert all(0 <= lost <= 2 * SAVED_EVERY for each in outcomes.values() for lost in each.lost_steps)
    assert all(len(each.back_s) == 1 for each in outcomes.values())
