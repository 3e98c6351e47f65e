"""The process is killed while it saves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.checkpoint.ranks import run_ranks
from tests.checkpoint.test_store import assert_holds, save
from vitscale.checkpoint.store import SoleRank, open_newest
from vitscale.faults import POINTS

OF_SAVES = [point for point in POINTS if point.startswith("save.")]
RENAMED = OF_SAVES.index("save.renamed")


def saver(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.checkpoint.saver", *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)


def wait_for_writers(root: Path) -> None:
    """Until no process writes there: each leaves once its parent is gone."""
    deadline = time.monotonic() + 30
    while writers := [line for line in command_lines() if str(root) in line]:
        assert time.monotonic() < deadline, writers
        time.sleep(0.01)


def command_lines() -> Iterator[str]:
    for process in psutil.process_iter(["cmdline"]):
        yield " ".join(process.info["cmdline"] or ())


@pytest.mark.parametrize("point", OF_SAVES)
def test_killed_at_any_point_a_whole_checkpoint_is_newest(tmp_path, point):
    for step in (1, 2):
        run_ranks(2, lambda ranks, step=step: save(tmp_path, step, ranks=ranks))
    step = 2 if point == "save.old_moved" else 3  # the old one is moved only when its step is saved again
    died = saver(tmp_path, step, 2, point)
    assert died.returncode == -signal.SIGKILL, died.stderr
    wait_for_writers(tmp_path)

    assert_holds(open_newest(tmp_path, SoleRank(), pytest.fail), 3 if OF_SAVES.index(point) >= RENAMED else 2)

    run_ranks(2, lambda ranks: save(tmp_path, 4, 2, ranks=ranks, report=pytest.fail))
    expected = {"step_00000004", "step_00000003" if OF_SAVES.index(point) >= RENAMED else "step_00000002"}
    if point == "save.old_moved":
        expected = {"step_00000004", "step_00000001"}
    assert {path.name for path in tmp_path.iterdir()} == expected
