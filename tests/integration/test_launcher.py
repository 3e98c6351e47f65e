"""launch/torchrun.sh with two real ranks: what it returns, and that it leaves nobody behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.processes import ranks_of
from tests.integration.worlds import ROOT, losses, rows

STEPS = 100


class Launched:
    """A launch/torchrun.sh and what it printed."""

    def __init__(self, config: Path, *overrides: str) -> None:
        self.config, self.run = config, config.parent / "runs" / "run"
        self.log = config.parent / "launch.log"
        hidden = ("SLURM_", "RANK", "NNODES", "RDZV_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        environment = {"VITSCALE_VENV": sys.prefix, "NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", ROOT / "launch" / "torchrun.sh", "pretrain", config, f"train.steps={STEPS}", *overrides],
                cwd=config.parent,
                env={**inherited, **environment},
                stdout=log,
                stderr=log,
            )

    def wait(self) -> int:
        return self.process.wait(timeout=240)

    def wait_for_steps(self, count: int) -> None:
        metrics, deadline = self.run / "metrics.jsonl", time.monotonic() + 240
        while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def last_line(self) -> str:
        return self.log.read_text().splitlines()[-1]

    def ranks(self) -> list[int]:
        return ranks_of(self.config)

    def wait_for_nobody(self) -> None:
        deadline = time.monotonic() + 60
        while self.ranks():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture
def launched(config: Path) -> Iterator[list[Launched]]:
    """A list to keep what was launched in; what still runs at the end is ended."""
    kept: list[Launched] = []
    yield kept
    for launch in kept:
        launch.process.kill()
        launch.process.wait()
        for pid in launch.ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_term_saves_and_the_same_command_goes_on(config: Path, launched: list[Launched]) -> None:
    first = Launched(config)
    launched.append(first)
    first.wait_for_steps(3)
    first.process.terminate()
    assert first.wait() == 3, first.log.read_text()
    said = json.loads((first.run / "exit.json").read_text())
    assert (said["code"], said["reason"]) == (3, "stopped on request")
    assert 3 <= said["step"] < STEPS
    assert f"stopped on request at step {said['step']}" in first.last_line()
    assert not (first.run / "stop").exists()
    assert first.ranks() == []

    second = Launched(config)
    launched.append(second)
    assert second.wait() == 0, second.log.read_text()
    assert list(losses(second.run)) == list(range(1, STEPS + 1))
    assert len(list((second.run / "launch").iterdir())) == 2


def test_usr1_to_all_is_a_request_and_a_second_ctrl_c_ends_them(config: Path, launched: list[Launched]) -> None:
    """torchrun, which would die of USR1, ignores it; the ranks have no 30 s in which they are waited for."""
    launch = Launched(config, "train.steps=100000", "data.threads=1")
    launched.append(launch)
    launch.wait_for_steps(3)
    (torchrun,) = psutil.Process(launch.process.pid).children()
    torchrun.send_signal(signal.SIGUSR1)
    reached = losses(launch.run)
    launch.wait_for_steps(len(reached) + 3)
    for pid in launch.ranks():
        os.kill(pid, signal.SIGSTOP)  # they cannot answer
    launch.process.send_signal(signal.SIGUSR1)
    launch.process.send_signal(signal.SIGUSR1)  # once more is no insisting
    deadline = time.monotonic() + 60
    while not (launch.run / "stop").exists():
        assert time.monotonic() < deadline, launch.log.read_text()
        time.sleep(0.05)
    assert launch.process.poll() is None
    launch.process.send_signal(signal.SIGINT)
    assert launch.wait() == 130, launch.log.read_text()
    launch.wait_for_nobody()


def test_bad_input_on_the_ranks_is_the_last_line(config: Path, launched: list[Launched]) -> None:
    launch = Launched(config, "data.train=/nowhere/*.tar")
    launched.append(launch)
    assert launch.wait() == 2, launch.log.read_text()
    assert "error: " in launch.last_line()
    assert "/nowhere/*.tar" in launch.last_line()


def test_a_run_whose_rank_is_killed_is_to_be_started_again(config: Path, launched: list[Launched]) -> None:
    launch = Launched(config)
    launched.append(launch)
    launch.wait_for_steps(3)
    os.kill(launch.ranks()[-1], signal.SIGKILL)
    assert launch.wait() == 3, launch.log.read_text()
    assert "ended by the infrastructure: another rank is gone" in launch.last_line()
    launch.wait_for_nobody()


@pytest.mark.full
def test_restarts_in_place(config: Path, launched: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTARTS", "1")
    launch = Launched(config, "checkpoint.every_steps=5")
    launched.append(launch)
    launch.wait_for_steps(8)
    for rank in launch.ranks():
        os.kill(rank, signal.SIGKILL)
    assert launch.wait() == 0, launch.log.read_text()
    assert list(losses(launch.run)) == list(range(1, STEPS + 1))
    first, ended, again, done = rows(launch.run, "attempts.jsonl")
    assert (first["step"], ended["code"], ended["step"]) == (0, 3, again["step"])
    assert again["step"] >= 5
    assert (done["code"], done["reached"]) == (0, STEPS)


@pytest.mark.full
def test_a_killed_launcher_takes_its_ranks_along(config: Path, launched: list[Launched]) -> None:
    launch = Launched(config)
    launched.append(launch)
    launch.wait_for_steps(3)
    launch.process.kill()
    launch.wait()
    launch.wait_for_nobody()
    again = Launched(config)  # nobody holds the folder
    launched.append(again)
    assert again.wait() == 0, again.log.read_text()
    assert list(losses(again.run)) == list(range(1, STEPS + 1))


@pytest.mark.full
def test_a_stopped_rank_is_named_and_the_run_ends_to_go_on(config: Path, launched: list[Launched]) -> None:
    launch = Launched(config, "parallel.patience_s=3")
    launched.append(launch)
    launch.wait_for_steps(3)
    rank = launch.ranks()[-1]
    os.kill(rank, signal.SIGSTOP)
    assert launch.wait() == 3, launch.log.read_text()
    assert f"its process {rank} is stopped" in launch.last_line()
    launch.wait_for_nobody()
    again = Launched(config, "parallel.patience_s=3")
    launched.append(again)
    assert again.wait() == 0, again.log.read_text()
    assert list(losses(again.run)) == list(range(1, STEPS + 1))
