from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vitscale.errors import LaunchError
from vitscale.files.atomic import write_atomically
from vitscale.lease import FolderInUse
from vitscale.run_folder import RunFolder


def _hold(path: Path) -> None:
    with RunFolder(path).locked():
        (path / "holding").touch()
        time.sleep(60)


def test_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "holding").exists():
        assert holder.is_alive()
        time.sleep(0.01)
    with pytest.raises(LaunchError, match=rf"process {holder.pid} on .*vitscale stop"), RunFolder(tmp_path).locked():
        pass
    with pytest.raises(FolderInUse):
        RunFolder(tmp_path).require_free()
    assert holder.pid is not None
    assert RunFolder(tmp_path).owner().startswith(f"process {holder.pid} on ")
    threading.Timer(0.5, os.kill, (holder.pid, signal.SIGKILL)).start()
    RunFolder(tmp_path).require_free(patience_s=60)
    with RunFolder(tmp_path).locked():
        assert RunFolder(tmp_path).owner().startswith(f"process {os.getpid()} on ")
    holder.join()


def test_the_first_to_say_why_is_heard(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_exit() is None
    assert folder.write_exit(2, 7, "a cut shard")
    assert not folder.write_exit(1, None, "connection closed by peer")
    assert folder.read_exit() == {"code": 2, "step": 7, "reason": "a cut shard", "attempt": ""}
    assert folder.write_exit(1, 7, "once too often", replaces=True)
    assert folder.read_exit() == {"code": 1, "step": 7, "reason": "once too often", "attempt": ""}
    folder.clear_exit()
    assert folder.read_exit() is None
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_record_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    """That of another attempt is none."""
    folder = RunFolder(tmp_path, "2")
    RunFolder(tmp_path, "1").write_exit(0, 5, "done")
    assert folder.await_exit(0.1) is None
    threading.Timer(0.3, folder.write_exit, (3, 9, "a rank is gone", True)).start()
    record = folder.await_exit(60)
    assert record is not None
    assert (record["code"], record["attempt"]) == (3, "2")


def test_write_atomically_leaves_one_file(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_atomically(tmp_path / "folder" / "file", text)
    assert (tmp_path / "folder" / "file").read_text() == "two"
    assert len(list((tmp_path / "folder").iterdir())) == 1


@pytest.mark.parametrize(("run_dir", "name", "key"), [("", "ä" * 130, "run.name"), ("d" * 300, "run", "run.dir")])
def test_a_name_that_is_too_long(tmp_path: Path, run_dir: str, name: str, key: str) -> None:
    with pytest.raises(LaunchError, match=rf"^{key}=.* too long"), RunFolder.at(str(tmp_path / run_dir), name).locked():
        pass


def test_a_start_that_is_announced_holds_the_folder_while_its_launcher_lives(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.is_held()
    folder.announce()
    assert folder.is_held()
    assert not folder.is_taken()
    with folder.locked():  # it keeps nobody from it
        folder.withdraw()
        assert folder.is_held()
    assert not folder.is_held()
    launcher = multiprocessing.get_context("spawn").Process(target=folder.announce)
    launcher.start()
    launcher.join()
    assert not folder.is_held(), "it is dead"
    (tmp_path / "starting").write_text("0000000000\nprocess 5 on far\nfar 5 5\n")
    assert folder.is_held(), "nobody can say here"
