"""Ranks as other launchers than ours start them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.worlds import Launcher, losses
from vitscale.run_folder import BAD_INPUT, DONE, FAILED, STOPPED

KUBEFLOW = {"LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None}  # torchrun's variables but for these: one process a pod


@pytest.mark.parametrize("stage", [0, 2])
def test_kubeflows_variables(launcher: Launcher, config: Path, tmp_path: Path, stage: int) -> None:
    argv = ["pretrain", str(config), f"parallel.zero_stage={stage}", "train.steps=3"]
    world = launcher.request(2, argv=argv, environment=KUBEFLOW)
    assert world.wait() == [0, 0], world.output()
    parts = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["startup_seconds"]
    assert list(parts) == ["imports", "index", "joining", "agreement", "all-reduce", "model", "weights", "engine",
                           "first batch", "first step"]  # fmt: skip
    assert len(re.findall(r"start-up: .*; an all-reduce of 16 MB takes \d+ ms", world.output())) == 1
    launcher.run([*argv, "run.name=torchrun"], 2)
    assert losses(tmp_path / "runs" / "run") == losses(tmp_path / "runs" / "torchrun")


@pytest.mark.parametrize("wrong", ["absent", "host", "port"])
def test_ranks_that_do_not_meet(launcher: Launcher, config: Path, wrong: str) -> None:
    """The other rank never comes, or the place where they meet is none: a line of what to look at."""
    argv = ["pretrain", str(config), "parallel.zero_stage=2", "parallel.timeout_s=2"]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        changed = {"absent": {}, "host": {"RANK": "1", "MASTER_ADDR": "no.such.host"}, "port": {"MASTER_PORT": port}}
        world = launcher.request(1, argv=argv, environment=KUBEFLOW | {"WORLD_SIZE": "2"} | changed[wrong])
        assert world.wait() == [BAD_INPUT], world.output()
    (line,) = (line for line in world.output().splitlines() if line.startswith("vitscale: error: "))
    assert "MASTER_ADDR=" in line
    assert "parallel.timeout_s=2" in line
    assert (port if wrong == "port" else "no.such.host" if wrong == "host" else "MASTER_PORT=") in line
    assert "Traceback" not in world.output()


def test_the_doctor_on_two_nodes(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """Each rank a node of its own, as Kubeflow's pods are."""
    before = sorted(tmp_path.rglob("*"))
    world = launcher.request(2, argv=["doctor", str(config)], environment=KUBEFLOW)
    assert world.wait() == [0, 0], world.output()
    lines = world.output().splitlines()
    assert any(line.startswith("ok") and "over 2 ranks" in line and "64 MB" in line for line in lines), lines
    assert any("slowest link: " in line for line in lines), lines
    assert any(line.startswith("ok") and "all ranks: can be read" in line for line in lines), lines
    assert not any(line.startswith("FAILED") for line in lines)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_whose_output_nobody_reads(config: Path, tmp_path: Path) -> None:
    """Its reader left, as `| head` does: it trains to its end."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vitscale.cli", "pretrain", str(config), "train.steps=4", "log.every_steps=1"]
    done = subprocess.run(command, stdout=write, stderr=write, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == DONE
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["steps"] == 4


@pytest.mark.parametrize(("failure", "code"), [("EPIPE", FAILED), ("ESHUTDOWN", STOPPED), ("EROFS", STOPPED)])
def test_a_write_that_fails_is_no_success(launcher: Launcher, config: Path, failure: str, code: int) -> None:
    world = launcher.request(
        1, argv=["pretrain", str(config)], environment={"VITSCALE_FAULT": f"point=row action=raise:{failure}"}
    )
    assert world.wait() == [code], world.output()
