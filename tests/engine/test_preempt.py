from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from vitscale.engine import preempt
from vitscale.engine.preempt import StopRequest


@pytest.fixture(autouse=True)
def _keep_handler() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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
