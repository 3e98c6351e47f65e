"""Asked to save, and to stop in the middle of an evaluation: the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.integration.worlds import Launcher, World, losses, rows, trace, weights
from vitscale.cli import main
from vitscale.run_folder import DONE, STOPPED


def wait_for(world: World, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, world.output()
        time.sleep(0.005)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_stopped_within_an_evaluation(launcher: Launcher, config: Path, shards: Path, tmp_path: Path) -> None:
    """It is done by the next start; rows, samples and weights are those of the unbroken run."""
    argv = ["pretrain", str(config), "parallel.zero_stage=2", "train.steps=6", "evaluation.every_steps=4"]
    argv += [f"data.validation={shards}/*.tar", f"evaluation.test={shards}/*.tar", "evaluation.batch=4"]
    launcher.run([*argv, "run.name=unbroken"], ranks=2)
    run, unbroken = tmp_path / "runs" / "run", tmp_path / "runs" / "unbroken"
    for step in (4, 6):  # the last one too
        world = launcher.start(argv, ranks=2)
        wait_for(world, lambda step=step: lines(run / "trace.jsonl") == step)  # type: ignore[misc]
        os.kill(world.pids[1], signal.SIGUSR1)
        assert world.wait() == [STOPPED] * 2, world.output()
        assert lines(run / "metrics.jsonl") == step - 1, "the evaluation was not over"
        manifest = json.loads((run / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
        assert manifest["state"]["pending"]["row"]["step"] == step
        exit_record = json.loads((run / "exit.json").read_text())
        assert exit_record.items() >= {"code": STOPPED, "step": step, "reason": "stopped on request"}.items()
    launcher.run(argv, ranks=2, code=DONE)
    assert losses(run) == losses(unbroken)
    assert trace(run) == trace(unbroken)
    scores = [{k: v for k, v in row.items() if "/" in k or k == "lr"} for row in rows(run)]
    assert scores == [{k: v for k, v in row.items() if "/" in k or k == "lr"} for row in rows(unbroken)]
    mine, theirs = weights(run), weights(unbroken)
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_save_waits_for_the_checkpoint_and_the_run_goes_on(
    launcher: Launcher, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "run"
    world = launcher.start(["pretrain", str(config), "train.steps=100000"], ranks=2)
    wait_for(world, lambda: lines(run / "metrics.jsonl") > 2)
    assert main(["save", str(run)]) == DONE
    saved = Path(capsys.readouterr().out.strip())
    assert json.loads((saved / "manifest.json").read_text())["state"]["step"] > 0
    assert not (run / "save").exists()
    at = lines(run / "metrics.jsonl")
    wait_for(world, lambda: lines(run / "metrics.jsonl") > at + 2)
    os.kill(world.pids[1], signal.SIGUSR1)
    assert world.wait() == [STOPPED] * 2, world.output()
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert main(["save", str(run)]) != DONE
    assert "no run holds this folder" in capsys.readouterr().err


def test_stopped_as_soon_as_it_starts(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """No rank waits for one that has left."""
    run = tmp_path / "runs" / "run"
    world = launcher.start(["pretrain", str(config), "train.steps=100000"], ranks=2)
    wait_for(world, (run / "config.yaml").exists)  # the process group is there, the engine is not
    (run / "stop").touch()
    assert world.wait()[0] == STOPPED, world.output()
    assert json.loads((run / "exit.json").read_text())["code"] == STOPPED
    assert not (run / "stop").exists()
