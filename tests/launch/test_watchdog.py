"""A node's ranks watched: which one hangs, which ones only wait, and which work for long."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vitscale.config.load import config_of
from vitscale.config.schema import RunConfig
from vitscale.heartbeat import Pulse
from vitscale.launch.watchdog import Limits, Watchdog, watch
from vitscale.run_folder import DONE, STOPPED, RunFolder

# A rank without a model: it beats through steps, then does what it is told, in the phase that it is told.
RANK = """
import subprocess, sys, time
from vitscale import heartbeat
folder, rank, phase, action = sys.argv[1:]
heartbeat.start(folder, int(rank))
for step in range(1, 4):
    with heartbeat.phase("data"):
        time.sleep(0.05)
    heartbeat.stepped(step)
if action == "helper":
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "vitscale.data.reader"])
    helper.send_signal(19)
def stands_here():
    time.sleep(0.0 if action == "ends" else 2.0 if action == "works" else 60.0)
with heartbeat.phase(phase):
    stands_here()
"""
PATIENCE_S = 0.7


class Node:
    """Ranks, one for each (phase, action), below a process as torchrun is one."""

    def __init__(self, folder: Path, *ranks: tuple[str, str]) -> None:
        self.pulses, self.run = folder / "pulses", RunFolder(folder / "run")
        self.pulses.mkdir()
        words = [[sys.executable, "-c", RANK, str(self.pulses), str(n), *rank] for n, rank in enumerate(ranks)]
        starter = "import subprocess, sys; [p.wait() for p in [subprocess.Popen(w) for w in eval(sys.argv[1])]]"
        self.process = subprocess.Popen([sys.executable, "-c", starter, repr(words)])

    def watch(self, **parallel: float) -> int:
        keys = [f"parallel.{key}={value}" for key, value in ({"patience_s": PATIENCE_S} | parallel).items()]
        return watch(self.process, self.pulses, config(*keys), self.run)

    def pid(self, rank: int) -> int:
        """Once it has taken its steps."""
        path = self.pulses / f"{rank}.pulse"
        while not path.exists() or Pulse.read(path).step < 3:
            time.sleep(0.02)
        return Pulse.read(path).pid

    def said(self) -> str:
        """Why the run was ended, once nobody is left."""
        for path in self.pulses.glob("*.pulse"):
            assert not Path(f"/proc/{Pulse.read(path).pid}").exists()
        exit_record = self.run.read_exit()
        assert exit_record is not None
        assert (exit_record["code"], exit_record["step"]) == (STOPPED, 3)
        return str(exit_record["reason"])


def config(*keys: str) -> RunConfig:
    return config_of({}, ["train.steps=1", *keys])


def test_a_stopped_rank_is_named_and_those_that_wait_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Node(tmp_path, ("exchange", "hangs"), ("exchange", "hangs"))
    stopped = threading.Thread(target=lambda: os.kill(node.pid(1), signal.SIGSTOP))
    stopped.start()
    assert node.watch() == STOPPED
    stopped.join()
    pid = Pulse.read(node.pulses / "1.pulse").pid
    assert f"after step 3; its process {pid} is stopped (by a signal: kill -CONT {pid} lets it go on)" in node.said()
    printed = capsys.readouterr().err
    assert printed.count("no sign of life") == printed.count(f"rank 1 on {os.uname().nodename} has given no sign") == 1
    assert "rank 1: prints no stacks" in printed
    assert "in stands_here" in printed.partition("rank 0: ")[2]


def test_the_one_that_is_behind_is_named_with_its_stacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = Node(tmp_path, ("tracking", "hangs"), ("exchange", "hangs"))
    assert node.watch() == STOPPED
    assert "rank 0 on " in node.said()
    assert "in 'tracking' after step 3" in node.said()
    assert "in stands_here" in capsys.readouterr().err


def test_a_stopped_reader_is_named(tmp_path: Path) -> None:
    node = Node(tmp_path, ("data", "helper"))
    assert node.watch() == STOPPED
    assert "in 'data' after step 3; its process " in node.said()
    assert ", its reader " in node.said()


def test_one_that_goes_on_in_time_is_no_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = Node(tmp_path, ("end", "works"))

    def halt() -> None:
        os.kill(node.pid(0), signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(node.pid(0), signal.SIGCONT)

    halting = threading.Thread(target=halt)
    halting.start()
    assert node.watch(patience_s=1.5) == DONE
    halting.join()
    assert capsys.readouterr().err == ""


def test_a_dead_rank_does_not_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = Node(tmp_path, ("tracking", "hangs"), ("end", "works"))
    killing = threading.Thread(target=lambda: os.kill(node.pid(0), signal.SIGKILL))
    killing.start()
    assert node.watch() == DONE
    killing.join()
    assert capsys.readouterr().err == ""


def test_what_may_take_long_is_no_alarm_and_data_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = ("start", "data", "exchange", "validation", "save")
    node = Node(tmp_path, *[(phase, "works") for phase in phases])
    assert node.watch() == DONE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rank 1 on ")
    assert line.endswith("it is waited for: data.patience_s=300")


def test_those_who_wait_speak_late_but_before_gloo() -> None:
    limits = Limits.of(config("parallel.timeout_s=600"))
    assert limits.patience_s == 60
    assert Limits.of(config("parallel.timeout_s=40")).patience_s == 20
    assert limits.of_phase("step", behind=True) == limits.of_phase("tracking", behind=False) == 60
    assert limits.of_phase("step", behind=False) == limits.of_phase("exchange", behind=True) == 540
    assert limits.of_phase("data", behind=True) == 360
    assert Limits.of(config("data.patience_s=7")).of_phase("data", behind=True) == 67


def test_a_hang_is_found_though_temporary_files_were_cleaned_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Node(tmp_path, ("tracking", "hangs"), ("exchange", "hangs"))
    pids = [node.pid(rank) for rank in range(2)]

    def clean() -> None:
        time.sleep(1.5)
        folder = os.open(node.pulses, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # systemd-tmpfiles would leave it alone
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        shutil.rmtree(node.pulses)

    cleaning = threading.Thread(target=clean)
    cleaning.start()
    assert node.watch(patience_s=3) == STOPPED
    cleaning.join()
    assert not node.pulses.exists()
    assert "in 'tracking' after step 3" in node.said()
    assert "in stands_here" in capsys.readouterr().err
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_hang_is_ended_though_its_stacks_cannot_be_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Node(tmp_path, ("tracking", "hangs"))

    def fails(*_: object) -> None:
        raise FileNotFoundError("0.stacks")

    monkeypatch.setattr(Watchdog, "print_stacks", fails)
    assert node.watch() == STOPPED
    assert "in 'tracking' after step 3" in node.said()
    assert "the stacks cannot be printed: 0.stacks" in capsys.readouterr().err


def test_a_stopped_launcher_whose_ranks_are_gone_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While they live they train on without it."""
    node = Node(tmp_path, ("end", "works"), ("end", "works"))
    pids = [node.pid(rank) for rank in range(2)]
    node.process.send_signal(signal.SIGSTOP)

    def kill() -> None:
        time.sleep(1.5)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    killing, began = threading.Thread(target=kill), time.monotonic()
    killing.start()
    assert node.watch() == STOPPED
    killing.join()
    assert time.monotonic() - began > 1.5
    said = node.run.read_exit()
    assert said is not None
    assert said["code"] == STOPPED
    assert f"process {node.process.pid} on " in said["reason"]
    assert said["reason"].endswith(", which is over the ranks, is stopped, and none of them lives")
    assert said["reason"] in capsys.readouterr().err


def test_a_folder_of_heartbeats_that_is_not_there_is_no_supervisor(tmp_path: Path) -> None:
    """It came with the environment of another run."""
    code = f"from vitscale import heartbeat; heartbeat.start({str(tmp_path / 'gone')!r}, 0); heartbeat.enter('data')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
