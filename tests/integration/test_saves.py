"""Checkpoints while training goes on: a slow one, one that fails, the last one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.worlds import Launcher, losses, rows
from vitscale.checkpoint.store import SoleRank, open_checkpoint
from vitscale.run_folder import STOPPED

WORLDS = pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2)])


def argv_of(config: Path, stage: int, *overrides: str) -> list[str]:
    micro = "train.micro_batch=8"
    return ["pretrain", str(config), f"parallel.zero_stage={stage}", micro, "checkpoint.every_steps=2", *overrides]


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("state-*")}


@WORLDS
def test_a_slow_save_holds_up_no_step(launcher: Launcher, config: Path, tmp_path: Path, ranks: int, stage: int) -> None:
    """The others that were due in its time become one, after it; it is the same bytes as one that is waited for."""
    argv = argv_of(config, stage, "checkpoint.keep=20")
    waited, run = tmp_path / "runs" / "waited", tmp_path / "runs" / "run"
    notice = ["checkpoint.asynchronous=false", "checkpoint.notice_s=0.001"]
    output = launcher.run([*argv, "run.name=waited", *notice], ranks)
    assert output.count("more than checkpoint.notice_s=0.001") == 1, "a save takes longer: told once, by rank 0"
    slow = {"rank": ranks - 1, "point": "save.state_begun", "nth": 1, "until": [str(run / "metrics.jsonl"), 9]}
    launcher.run(argv, ranks, kill=slow)
    assert steps(waited) == list(range(2, 21, 2))
    first, *later = steps(run)
    assert first == 2
    assert later[-1] == 20
    assert later[0] > 9
    assert losses(run) == losses(waited)
    for step in (2, 20):
        folder = f"checkpoints/step_{step:08d}"
        assert digests(run / folder) == digests(waited / folder)
        open_checkpoint(run / folder, SoleRank())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The run's checkpoints/ on a file system of its own, on which there is room for one and a half of them."""
    disk = tmp_path / "runs" / "run" / "checkpoints"
    disk.mkdir(parents=True)
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode:
        pytest.skip("mounting needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@WORLDS
def test_a_full_disk_fails_saves_and_the_last_one_ends_the_run(
    launcher: Launcher, config: Path, tmp_path: Path, small_disk: Path, ranks: int, stage: int
) -> None:
    run = tmp_path / "runs" / "run"
    argv = argv_of(config, stage, "checkpoint.asynchronous=false", "checkpoint.keep=1")
    size = sum(path.stat().st_size for path in _first(launcher, argv, tmp_path, ranks).iterdir())
    subprocess.run(["mount", "-o", f"remount,size={3 * size // 2 >> 12 << 2}k", small_disk], check=True)
    output = launcher.run(argv, ranks, code=STOPPED)
    assert steps(run) == [2]
    assert [row["save_failures"] for row in rows(run)][::4] == [0, 1, 3, 5, 7]
    assert output.count("make room or lower checkpoint.keep)") == 10  # 9 that were due, and the last one once more
    assert output.count("training goes on, and the next save is tried as usual") == 9
    assert output.count("vitscale: error:") == 1
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    launcher.run([*argv, "checkpoint.every_steps=20"], ranks)
    assert losses(run) == losses(tmp_path / "runs" / "first")
    assert rows(run)[-1]["save_failures"] == 0  # those were after the step that it went on from
    assert steps(run) == [20]


@pytest.mark.parametrize(
    ("ranks", "timeout_s", "last"),
    [(1, 1, False), (1, 1, True), pytest.param(2, 5, False, marks=pytest.mark.full),
     pytest.param(2, 5, True, marks=pytest.mark.full)],
)  # fmt: skip
def test_a_save_whose_storage_hangs_on_rank_0_ends_the_run(
    launcher: Launcher, config: Path, tmp_path: Path, ranks: int, timeout_s: int, last: bool
) -> None:
    """Beyond the ranks' files, whose writing is limited by itself. last: nothing but this save is left to do."""
    argv = argv_of(config, 0, f"parallel.timeout_s={timeout_s}", f"train.steps={2 if last else 1_000_000}")
    fault = {"VITSCALE_FAULT": "point=save.manifest_written rank=0 action=sleep:1000"}
    world = launcher.request(ranks, argv=argv, environment=fault)
    assert world.wait() == [STOPPED] * ranks, world.output()
    said = json.loads((tmp_path / "runs" / "run" / "exit.json").read_text())
    words = f"the save has not ended in {6 * timeout_s} s, while its manifest is written and it is given its name"
    assert words in said["reason"]
    assert "step_00000002" in said["reason"]
    assert words in world.output()


def _first(launcher: Launcher, argv: list[str], tmp_path: Path, ranks: int) -> Path:
    """The last checkpoint of a run that has room."""
    launcher.run([*argv, "run.name=first"], ranks)
    return tmp_path / "runs" / "first" / "checkpoints" / "step_00000020"
