"""What a run does with a request, in real processes: signals, files, the first step and later."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vitscale.engine import preempt
from vitscale.engine.preempt import StopRequest
from vitscale.run_folder import INTERRUPTED, STOPPED, RunFolder
from vitscale.world import World

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys, time
from pathlib import Path
from vitscale.engine.preempt import StopRequest
from vitscale.run_folder import RunFolder
from vitscale.world import World

class Slow(RunFolder):
    @property
    def stop(self):
        time.sleep(60 if sys.argv[2] == "hanging" else 0)
        return super().stop

with StopRequest(Slow(Path(sys.argv[1])), World(rank=int(sys.argv[3]), world_size=2)) as stop:
    if sys.argv[2] != "before":
        assert not stop.requested()
    print("begun", flush=True)
    while sys.argv[2] == "before" or not stop.requested():
        time.sleep(0.01)
    print("stops", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    kept: list[subprocess.Popen[str]] = []
    yield kept
    for process in kept:
        process.kill()
        process.communicate()


def start(started: list[subprocess.Popen[str]], folder: Path, phase: str, rank: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(folder), phase, str(rank)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_signal_is_heard_while_the_folder_hangs(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    process = start(started, tmp_path, "hanging")
    time.sleep(1.5 * preempt.POLL_SECONDS)  # it looks for the files by now
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "stops\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_counts_on_any_rank(
    tmp_path: Path, started: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = start(started, tmp_path, "training", rank=1)
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "stops\n"
    assert process.poll() is None, "whoever asked saves first"
    assert RunFolder(tmp_path).read_exit() is None


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    process = start(started, tmp_path, "training")
    for _ in range(2):  # the terminal's, and the same one passed on
        process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "stops\n"
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == INTERRUPTED


@pytest.mark.parametrize("request_", ["signal", "file"])
def test_before_the_first_step_it_leaves_at_once(
    tmp_path: Path, started: list[subprocess.Popen[str]], request_: str
) -> None:
    process, folder = start(started, tmp_path, "before"), RunFolder(tmp_path)
    if request_ == "file":
        folder.stop.touch()
    else:
        process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == STOPPED
    assert json.loads(folder.exit.read_text())["code"] == STOPPED
    assert not folder.stop.exists(), "the next start goes on"
    assert process.stderr is not None
    assert "the same command starts again" in process.stderr.read()


# ---- files


def seen(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_files_are_seen_and_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preempt, "POLL_SECONDS", 0.01)
    folder = RunFolder(tmp_path)
    with StopRequest(folder, World()) as stop:
        assert not stop.requested()
        folder.save.touch()
        assert seen(stop.save_requested)
        (folder.checkpoints / "step_00000006").mkdir(parents=True)  # of a save that was under way
        stop.saving(7)
        assert not stop.save_requested()
        time.sleep(0.1)
        assert folder.save.exists(), "its checkpoint is not there yet"
        assert not stop.save_requested()
        (folder.checkpoints / "step_00000007").mkdir()
        assert seen(lambda: not folder.save.exists())
        folder.save.touch()
        assert seen(stop.save_requested), "the next one"
        folder.stop.touch()
        assert seen(stop.requested)
        stop.clear()
        assert not folder.stop.exists()


def test_one_rank_a_node_looks_for_the_stop_file_and_rank_0_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preempt, "POLL_SECONDS", 0.01)
    folder = RunFolder(tmp_path)
    folder.stop.touch()
    folder.save.touch()
    with (
        StopRequest(folder, World(rank=2, world_size=4, local_rank=0, local_world_size=2)) as first_of_node,
        StopRequest(folder, World(rank=1, world_size=4, local_rank=1, local_world_size=2)) as second,
    ):
        assert not second.requested()
        assert seen(first_of_node.requested)
        assert not second.requested()
        assert not first_of_node.save_requested()
        second.clear()
        assert folder.stop.exists()


def test_the_handlers_of_before_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in preempt.SIGNALS]
    with StopRequest(RunFolder(tmp_path), World()):
        assert [signal.getsignal(number) for number in preempt.SIGNALS] != before
    assert [signal.getsignal(number) for number in preempt.SIGNALS] == before
