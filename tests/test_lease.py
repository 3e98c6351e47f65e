"""Who has a run's folder: one of all that want it, and the next once that one is dead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscale import lease
from vitscale.lease import FolderInUse, FolderLost, holder, require_free, take

RACER = """
import sys
from pathlib import Path
from vitscale.lease import FolderInUse, take
print("ready", flush=True)
for name in sys.stdin:
    try:
        taken = take(Path(name.strip()))
    except FolderInUse:
        print("refused", flush=True)
    else:
        print("has it", flush=True)
        sys.stdin.readline()
        taken.release()
        print("released", flush=True)
"""


@contextlib.contextmanager
def racers(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-c", RACER]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert answer(process) == "ready"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: subprocess.Popen[str], line: object = "") -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """All holders are other machines', for this process; time runs fast."""
    here = lease._machine()
    monkeypatch.setattr(lease, "_machine", lambda: f"another than {here}".replace(" ", "-"))
    monkeypatch.setattr(lease, "EXPIRES_S", 1.0)
    monkeypatch.setattr(lease, "_LOOK_S", 0.05)


def test_one_of_many_has_it_however_the_last_holder_ended(tmp_path: Path) -> None:
    with racers(4) as processes:
        for number in range(20):
            folder = tmp_path / str(number // 5)
            folder.mkdir(exist_ok=True)
            if number % 5 == 4:  # its holder died: a process that is no more, and its file is as it was left
                boot, pid = lease._machine(), 2**22 - 1
                (folder / f"lock-{number}").write_text(f"0000000003\nprocess {pid}\n{boot} {pid} 5\n")
            for process in processes:
                ask(process, folder)
            answers = [answer(process) for process in processes]
            assert sorted(answers) == ["has it", *["refused"] * 3], number
            winner = processes[answers.index("has it")]
            assert f"process {winner.pid} on" in holder(folder)
            assert len(list(folder.iterdir())) == 1
            ask(winner)
            assert answer(winner) == "released"


def test_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    with racers(1) as (process,):
        ask(process, tmp_path)
        assert answer(process) == "has it"
        with pytest.raises(FolderInUse, match=rf"in use by process {process.pid} on .*vitscale stop"):
            take(tmp_path)
        os.kill(process.pid, signal.SIGSTOP)  # it may go on
        with pytest.raises(FolderInUse):
            require_free(tmp_path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie holds nothing
        take(tmp_path).release()


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path: Path) -> None:
    content = f"0000000000\nthe one before\n{lease._machine()} {os.getpid()} 1\n"
    (tmp_path / "lock-7").write_text(content)
    taken = take(tmp_path, job="12")
    assert f"process {os.getpid()} on" in holder(tmp_path)
    assert ", job 12, since" in holder(tmp_path)
    taken.release()
    assert [path.name for path in tmp_path.iterdir()] == ["lock-8"]


@pytest.mark.usefixtures("elsewhere")
def test_another_machines_holder_is_told_by_its_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lock-3").write_text("0000000009\nprocess 1 on far since then\nfar 1 5\n")
    began = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - began > 1.0, "it may have lived"
    assert "looking whether process 1 on far since then lives" in capsys.readouterr().err


@pytest.mark.usefixtures("elsewhere")
def test_a_holder_that_wakes_up_too_late_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    first = take(tmp_path)
    first.require()
    with monkeypatch.context() as away:
        away.setattr(lease, "_machine", lambda: "third")
        with pytest.raises(FolderInUse):  # it counts
            take(tmp_path)
        first._released.set()  # from here on it is as if it were stopped
        first._thread.join()
        second = take(tmp_path)
    time.sleep(0.5)
    with pytest.raises(FolderLost, match=r"gave no sign of life for 1 s, and process \d+ on .* has taken the run"):
        first.require()
    first.release()
    second.require()
    assert (tmp_path / "lock-2").read_bytes().startswith(b"00000000"), "still held"
    second.release()


def test_a_file_that_is_not_found_for_a_moment_is_still_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS (ENOENT, ESTALE); one that stays away is a folder that was taken away."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRES_S", 1.0)
    folder, elsewhere = tmp_path / "run", tmp_path / "moved"
    folder.mkdir()
    taken = take(folder)
    folder.rename(elsewhere)
    time.sleep(0.3)
    taken.require()
    elsewhere.rename(folder)
    count = (folder / "lock-1").read_bytes()[:10]
    time.sleep(0.3)
    taken.require()
    assert (folder / "lock-1").read_bytes()[:10] > count
    folder.rename(elsewhere)
    time.sleep(1.3)
    with pytest.raises(FolderLost, match=r"run: the folder is gone: moved, removed, "):
        taken.require()
    taken.release()


def test_a_new_folder_in_the_place_of_a_moved_one_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease has the same number."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    (tmp_path / "run").mkdir()
    first = take(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    content = b"0000000007\nprocess 5 on far\nfar 5 5\n"
    (tmp_path / "run" / "lock-1").write_bytes(content)
    time.sleep(0.3)
    with pytest.raises(FolderLost, match="process 5 on far has taken the run"):
        first.require()
    first.release()
    assert (tmp_path / "run" / "lock-1").read_bytes() == content
