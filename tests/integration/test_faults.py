"""Faults around checkpoints: killed while saving, bytes changed on the disk."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.integration.worlds import Launcher, losses
from vitscale.faults import POINTS
from vitscale.run_folder import BAD_INPUT, STOPPED

OF_SAVES = [point.removeprefix("save.") for point in POINTS if point.startswith("save.")]
IN_CI = {("state_synced", 1), ("agreed", 0), ("manifest_written", 0), ("renamed", 0)}


def _argv(config: Path, *overrides: str) -> list[str]:
    return ["pretrain", str(config), "parallel.zero_stage=2", "checkpoint.every_steps=5", *overrides]


@pytest.fixture(scope="module")
def unbroken(launcher: Launcher, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    from tests.integration.conftest import write_config

    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(folder, shards, folder)
    launcher.run(_argv(config), 2)
    return losses(folder / "run")


@pytest.mark.parametrize(
    ("point", "rank"),
    [
        pytest.param(point, rank, marks=[] if (point, rank) in IN_CI else pytest.mark.full)
        for point in OF_SAVES
        for rank in ((0, 1) if point in ("state_begun", "state_synced", "agreed") else (0,))
        if point != "old_moved"  # only where a folder of the same step is replaced: tests/checkpoint
    ],
)
def test_killed_while_saving(
    launcher: Launcher, config: Path, tmp_path: Path, unbroken: dict[int, float], point: str, rank: int
) -> None:
    """SIGKILL at a point of the second save (for retention: the fourth): the run goes on from a whole one."""
    nth = 1 if point.startswith("reti") else 2
    argv = _argv(config, "checkpoint.keep=1")
    world = launcher.start(argv, 2, kill={"rank": rank, "point": f"save.{point}", "nth": nth})
    codes = world.wait()
    assert codes[rank] == -signal.SIGKILL, world.output()
    assert codes[1 - rank] == STOPPED, "it goes on by itself where something starts it again"
    assert "another rank is gone" in json.loads((tmp_path / "runs" / "run" / "exit.json").read_text())["reason"]
    output = launcher.run(argv, 2)
    assert "step_" in output
    assert losses(tmp_path / "runs" / "run") == unbroken


def test_killed_in_the_last_save(launcher: Launcher, config: Path, tmp_path: Path, unbroken: dict[int, float]) -> None:
    """What the other one waits for then is the save, whose failure is that of the rank."""
    argv = [*_argv(config), "checkpoint.every_steps=1000"]
    world = launcher.start(argv, 2, kill={"rank": 1, "point": "save.state_synced", "nth": 1})
    assert world.wait() == [STOPPED, -signal.SIGKILL], world.output()
    assert "another rank is gone" in json.loads((tmp_path / "runs" / "run" / "exit.json").read_text())["reason"]
    launcher.run(argv, 2)
    assert losses(tmp_path / "runs" / "run") == unbroken


@pytest.mark.parametrize("damage", ["flipped bit", "cut file", "torn manifest"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    launcher: Launcher, config: Path, tmp_path: Path, unbroken: dict[int, float], damage: str
) -> None:
    run = tmp_path / "runs" / "run"
    launcher.run(_argv(config, "train.steps=10"), 2)
    newest = run / "checkpoints" / "step_00000010"
    file = newest / ("manifest.json" if damage == "torn manifest" else "state-00001.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    output = launcher.run(_argv(config, "train.steps=10"), 2)
    assert file.name in output
    assert "step_00000005" in output
    assert sorted(losses(run)) == list(range(1, 11))


def test_checkpoint_of_another_model(launcher: Launcher, config: Path) -> None:
    launcher.run(_argv(config, "train.steps=5"), 2)
    output = launcher.run(_argv(config, "train.steps=10", "model.num_hidden_layers=3"), 2, code=BAD_INPUT)
    assert output.count("vitscale: error:") == 1
    assert "num_hidden_layers (saved 2, here 3)" in output


def test_another_model_of_the_same_shapes(launcher: Launcher, config: Path) -> None:
    launcher.run(_argv(config, "train.steps=5"), 2)
    argv = _argv(config, "train.steps=10", "model.num_attention_heads=4", "model.hidden_act=relu")
    output = launcher.run(argv, 2, code=BAD_INPUT)
    assert "num_attention_heads (saved 2, here 4)" in output
    assert "hidden_act (saved gelu, here relu)" in output


def test_another_order_of_samples_is_refused(launcher: Launcher, config: Path) -> None:
    launcher.run(_argv(config, "train.steps=5"), 2)
    output = launcher.run(_argv(config, "train.steps=10", "run.seed=1"), 2, code=BAD_INPUT)
    assert "run.seed=0, this run has 1" in output
