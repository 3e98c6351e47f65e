"""Checkpoints saved in the background, and what happens when that fails."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.checkpoint.ranks import run_ranks
from tests.checkpoint.test_store import assert_holds, save, share
from vitscale.checkpoint.fragments import Piece, copied
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.saving import Saver
from vitscale.checkpoint.store import SoleRank, open_newest
from vitscale.errors import StorageError

AtPoint = Callable[[str, Callable[[], None]], None]


def begin(saver: Saver, step: int, pieces: list[Piece] | None = None, required: bool = False) -> None:
    given = share(step, 0, 1) if pieces is None else pieces
    state = {"samples": step * 256, "loss": 0.1 + step}
    saver.begin(step, lambda reserve: copied(given, reserve), state, required=required)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_changes_after_the_snapshot_does_not_show(tmp_path: Path, at_point: AtPoint) -> None:
    """While it is written the weights change; the files are those of a save that is waited for."""
    expected = digests(save(tmp_path / "waited for", 3))
    changed = threading.Event()
    at_point("save.state_begun", lambda: changed.wait(30))
    pieces = [Piece(p.kind, p.name, p.shape, p.start, p.values.copy()) for p in share(3, 0, 1)]
    with Saver(tmp_path / "behind", SoleRank(), Retention(3)) as saver:
        begin(saver, 3, pieces)
        assert saver.busy
        for piece in pieces:
            piece.values.fill(0)
        changed.set()
    assert digests(tmp_path / "behind" / "step_00000003") == expected
    assert (saver.saved, saver.error, saver.failures) == ({3}, None, 0)


def test_one_is_in_flight_and_its_memory_is_used_again(tmp_path: Path) -> None:
    with Saver(tmp_path, SoleRank(), Retention(2)) as saver:
        for step in (1, 2, 3):
            begin(saver, step)  # waits for the one before
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    assert_holds(open_newest(tmp_path, SoleRank(), pytest.fail), 3)


def writers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "vitscale.checkpoint.writer" in child.cmdline()]


def kill_writer() -> None:
    for writer in writers():
        writer.send_signal(signal.SIGKILL)


def limit_writer() -> None:
    for writer in writers():
        resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (300, 300))


@pytest.mark.parametrize(
    ("fault", "says"),
    [(kill_writer, "state-00000.safetensors ended by signal 9"), (limit_writer, "[Errno 27] File too large")],
)
def test_a_save_that_fails_is_counted_and_told_and_the_next_one_succeeds(
    tmp_path: Path, at_point: AtPoint, fault: Callable[[], None], says: str
) -> None:
    told: list[str] = []
    with Saver(tmp_path, SoleRank(), Retention(3), told.append, failures=4) as saver:
        begin(saver, 1)
        saver.wait()
        at_point("save.state_begun", fault)
        begin(saver, 2)
        saver.wait()
        assert saver.failures == 5
        assert names(tmp_path) == ["step_00000001"]
        assert_holds(open_newest(tmp_path, SoleRank(), pytest.fail), 1)
        begin(saver, 3, required=True)  # which is not told, since it is raised
        saver.wait()
        assert isinstance(saver.error, StorageError)
        assert saver.error.requeues
        at_point("save.state_begun", lambda: None)
        begin(saver, 4)
    assert (saver.saved, saver.error, saver.failures) == ({1, 4}, None, 6)
    assert len(told) == 1
    assert says in told[0]
    assert "step_00000002: the checkpoint could not be written (rank 0: " in told[0]
    assert "training goes on" in told[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode:
        pytest.skip("mounting needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(small_disk: Path, at_point: AtPoint) -> None:
    root = small_disk / "checkpoints"
    run_ranks(2, lambda ranks: save(root, 1, ranks=ranks))

    def fill() -> None:
        with open(small_disk / "other", "ab") as stream, pytest.raises(OSError, match="No space left"):
            stream.write(bytes(2_000_000))

    at_point("save.state_begun", fill)
    errors = run_ranks(2, lambda ranks: save(root, 2, ranks=ranks))
    for error in errors:
        assert isinstance(error, StorageError)
        assert "step_00000002: the checkpoint could not be written (rank " in str(error)
        assert "No space left on device" in str(error)
    assert names(root) == ["step_00000001"]
    assert_holds(open_newest(root, SoleRank(), pytest.fail), 1)
    (small_disk / "other").unlink()
    at_point("save.state_begun", lambda: None)
    run_ranks(2, lambda ranks: save(root, 2, ranks=ranks))
    assert_holds(open_newest(root, SoleRank(), pytest.fail), 2)


def test_the_end_waits_for_the_save_in_flight(tmp_path: Path, at_point: AtPoint) -> None:
    """Also where training ended by an error."""
    at_point("save.state_begun", lambda: time.sleep(0.2))
    saver = Saver(tmp_path, SoleRank(), Retention(3))
    begin(saver, 1)
    saver.__exit__(KeyError)
    assert_holds(open_newest(tmp_path, SoleRank(), pytest.fail), 1)


def test_one_every_so_many_hours_stays(tmp_path: Path) -> None:
    """By the time of training that is behind each, in whatever starts it was spent."""
    hours = {1: 0.3, 2: 0.9, 3: 1.1, 4: 1.9, 5: 2.5, 6: 4.0, 7: 4.2}
    for start in ((1, 2, 3), (4, 5, 6, 7)):
        with Saver(tmp_path, SoleRank(), Retention(1, 1.0)) as saver:
            for step in start:
                saver.begin(
                    step, lambda reserve: copied([], reserve), {"elapsed_s": 3600 * hours[step]}, spared={2: "the best"}
                )
    assert names(tmp_path) == [f"step_{step:08d}" for step in (2, 3, 5, 6, 7)]
    folders = [tmp_path / name for name in reversed(names(tmp_path))]
    reasons = Retention(1, 1.0).kept(folders, {2: "the best"})
    assert list(reasons.values()) == ["one of the newest 1", *["one every 1 h"] * 3, "the best"]
