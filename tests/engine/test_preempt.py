from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from vitscale.engine import preempt
from vitscale.engine.preempt import StopRequest


@pytest.fixture(autouse=True)
def _keep_handler() -> object:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_stop_file_is_seen_and_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preempt, "POLL_SECONDS", 0.0)
    stop = StopRequest(tmp_path, looks=True, clears=True)
    assert not stop.requested()
    (tmp_path / "stop").touch()
    assert stop.requested()
    stop.honour()
    assert not (tmp_path / "stop").exists()


def test_other_ranks_do_not_look_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    stop = StopRequest(tmp_path, looks=False, clears=False)
    assert not stop.requested()
    stop.honour()
    assert (tmp_path / "stop").exists()


def test_looks_at_most_once_in_its_interval(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, looks=True, clears=True)
    assert not stop.requested()
    (tmp_path / "stop").touch()
    assert not stop.requested()


def test_term_counts_on_any_rank(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, looks=False, clears=False)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested()


def test_ctrl_c_asks_and_once_more_insists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(tmp_path, looks=False, clears=False)
    for _ in range(2):  # the terminal's, and the same one passed on
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested()
    later = time.monotonic() + 5
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
