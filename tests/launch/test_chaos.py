"""What `vitscale chaos` compares and counts; trials of it are in tests/integration/test_chaos.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from vitscale.errors import ConfigError
from vitscale.launch.breaking import KINDS
from vitscale.launch.chaos import Outcome, as_table, goodput, planned, run_trials
from vitscale.launch.trials import STEPS, Ground, differences, half_written, newest_checkpoint, rank_of
from vitscale.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


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
    assert differences(ground.unbroken, run, same_world=True) == []
    assert newest_checkpoint(run) == STEPS
    assert ground.like(run) == ground.unbroken


def test_a_checkpoint_without_a_manifest_is_half_written(tmp_path: Path) -> None:
    (fault,) = half_written(made(tmp_path / "run"))
    assert "manifest.json" in fault


def test_every_difference_is_found(ground: Ground, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    spoil(run.metrics, '"loss": 0.25}', '"loss": 0.2500000001}')
    assert differences(ground.unbroken, run, same_world=True) == ["the loss differs from step 4 on"]
    assert differences(ground.unbroken, run, same_world=False) == []
    spoil(run.metrics, '"loss": 0.2500000001}', '"loss": 0.2501}')
    assert differences(ground.unbroken, run, same_world=False) == ["the loss differs from step 4 on"]

    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([*lines[:3], *lines[4:]]))
    assert "steps are missing or twice in metrics.jsonl" in differences(ground.unbroken, run, same_world=True)
    run.metrics.write_text("".join([*lines, lines[-1]]))
    assert "steps are missing or twice in metrics.jsonl" in differences(ground.unbroken, run, same_world=True)

    spoil(run.path / "trace.jsonl", '"a/7"', '"a/8"')
    (run.model / "model.safetensors").write_bytes(b"others")
    (run.checkpoints / ".tmp-step_00000001").mkdir()
    found = differences(ground.unbroken, run, same_world=True)
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


def test_outcomes_add_up() -> None:
    outcome = Outcome(1, 1, 2, [1.0], [4], [10.0])
    outcome.add(Outcome(1, 0, 3, [2.0], [], [20.0], ["late"]))
    assert outcome == Outcome(2, 1, 5, [1.0, 2.0], [4], [10.0, 20.0], ["late"])


def test_an_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="--kinds 'fire': must be of 'rank killed'"):
        run_trials(["fire"], None, 0, 0)


def test_kinds_come_in_turns_and_then_kills() -> None:
    assert planned(["rank hangs", "all killed"], 3) == [("rank hangs", 2), ("all killed", 0), ("rank hangs", 0)]
    kinds = ["rank hangs", "all killed", "checkpoint damaged"]
    plan = planned(kinds, 3, 3 * KINDS["all killed"].faults)
    assert plan == planned(kinds, 3) + [("all killed", 2), ("all killed", 0)]
    assert planned(["rank hangs"], 1, 100) == [("rank hangs", 2)]


def test_the_docs_have_all_kinds_and_name_what_is_there() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    kinds = re.search(r"\| kind \| what is done \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    assert kinds is not None
    assert {name for row in kinds[1].splitlines() for name in row.split(" | ")[0].strip("| ").split(", ")} == set(KINDS)
    tried = text[text.index("## What was tried") :]
    assert set(re.findall(r'"([^"]+)"', tried)) <= set(KINDS)
    folder = ""
    for path in re.findall(r"((?:\w+/)?test_\w+\.py)", tried):
        folder = path.rpartition("/")[0] or folder  # as of the file before, where none is named
        assert any((ROOT / "tests" / each).exists() for each in (path, f"{folder}/{path}")), path
    assert len(re.findall(r"^\| ", tried, re.MULTILINE)) == 1 + 27


def test_a_helper_is_of_the_rank_that_has_started_it() -> None:
    """It has none of the launcher's variables."""
    program = "import os, subprocess, sys; del os.environ['RANK']; " \
              "subprocess.run([sys.executable, '-c', 'print(0, flush=True); input()'])"  # fmt: skip
    command = [sys.executable, "-c", program]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, "RANK": "3"}, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        rank = psutil.Process(process.pid)
        (helper,) = rank.children()
        assert "RANK" not in helper.environ()
        assert [rank_of(each) for each in (rank, helper)] == [3, 3]
        process.communicate(b"\n")
