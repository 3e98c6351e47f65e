"""Local files on a network file system that fails: calls of the kernel that raise, give less, or take long."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vitscale.config.schema import Source
from vitscale.data.patterns import expand
from vitscale.errors import DataError, StorageError
from vitscale.files import retry
from vitscale.files.retry import UnavailableError, retries, unreadable
from vitscale.files.store import FileStat, LocalFiles

DATA = bytes(range(256)) * 20
CALLS: dict[str, Callable[[LocalFiles, str], Any]] = {
    "stat": lambda store, path: store.stat(path),
    "open": lambda store, path: store.read(path, 100, 1000),
    "pread": lambda store, path: store.read(path, 100, 1000),
    "listdir": lambda store, path: store.list(f"{os.path.dirname(path)}/*.tar"),
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 0.005)
    path = tmp_path / "a.tar"
    path.write_bytes(DATA)
    os.utime(path, ns=(5, 7))
    return str(path)


def fail(monkeypatch: pytest.MonkeyPatch, call: str, errors: Sequence[int]) -> list[int]:
    """Let the next calls of os.CALL raise these errors; what is left of them."""
    exact, left = getattr(os, call), list(errors)

    def failing(*arguments: Any) -> Any:
        if left:
            code = left.pop(0)
            raise OSError(code, os.strerror(code))
        return exact(*arguments)

    monkeypatch.setattr(os, call, failing)
    return left


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("errors", [[errno.EIO], [errno.ESTALE] * 3, [errno.ETIMEDOUT, errno.EIO, errno.EAGAIN] * 4])
def test_what_passes_is_tried_again_and_each_time_counted(
    path: str, monkeypatch: pytest.MonkeyPatch, call: str, errors: list[int]
) -> None:
    expected = {"stat": FileStat(len(DATA), 7), "listdir": [path]}.get(call, DATA[100:1100])
    before, left = int(retries), fail(monkeypatch, call, errors)
    assert CALLS[call](LocalFiles(patience_s=60), path) == expected
    assert not left
    assert int(retries) - before == len(errors)


@pytest.mark.parametrize("call", CALLS)
def test_after_the_patience_the_run_is_to_be_requeued(path: str, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    left = fail(monkeypatch, call, [errno.ESTALE] * 10_000)
    began = time.monotonic()
    with pytest.raises(UnavailableError, match=r"Stale file handle; \d+ attempts") as caught:
        CALLS[call](LocalFiles(patience_s=0.05), path)
    assert time.monotonic() - began >= 0.05
    assert 10_000 - len(left) >= 8
    error = unreadable(path, caught.value)
    assert isinstance(error, StorageError)
    assert error.requeues
    assert path in str(error)


@pytest.mark.parametrize("call", ["stat", "open", "pread"])
@pytest.mark.parametrize(("patience_s", "code"), [(60, errno.EACCES), (60, errno.EISDIR), (0, errno.EIO)])
def test_what_does_not_pass_is_told_at_once(
    path: str, monkeypatch: pytest.MonkeyPatch, call: str, patience_s: float, code: int
) -> None:
    left = fail(monkeypatch, call, [code] * 3)
    with pytest.raises(OSError, match=os.strerror(code)):
        CALLS[call](LocalFiles(patience_s), path)
    assert len(left) == 2


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a second's trouble at the start is `no such file`, which nobody requeues."""
    source = (Source(f"{os.path.dirname(path)}/*.tar"),)
    fail(monkeypatch, "listdir", [errno.EIO] * 2)
    assert expand(source, LocalFiles(patience_s=60)) == [path]
    fail(monkeypatch, "listdir", [errno.ESTALE] * 3)
    parts = os.path.dirname(path).rsplit("/", 1)
    assert LocalFiles(patience_s=60).list(f"{parts[0]}/[{parts[1][0]}]{parts[1][1:]}/*.tar") == [path]
    fail(monkeypatch, "lstat", [errno.EIO])
    assert LocalFiles(patience_s=60).list(f"{parts[0]}/[{parts[1][0]}]{parts[1][1:]}/a.tar") == [path]
    fail(monkeypatch, "listdir", [errno.EIO] * 10_000)
    with pytest.raises(StorageError, match="its storage failed as a list: Input/output error"):
        expand(source, LocalFiles(patience_s=0.01))
    fail(monkeypatch, "listdir", [errno.ENOENT])
    with pytest.raises(DataError, match="no such file"):
        expand(source, LocalFiles(patience_s=60))


def test_short_and_slow_reads_are_put_together(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = os.pread

    def short(descriptor: int, count: int, start: int) -> bytes:
        time.sleep(0.001)
        return exact(descriptor, min(count, 7), start)

    monkeypatch.setattr(os, "pread", short)
    store, before = LocalFiles(patience_s=60), int(retries)
    for start, count in ((0, 1), (3, 7), (100, 1000), (len(DATA) - 10, 50), (len(DATA), 5), (5, 0)):
        assert store.read(path, start, count) == DATA[start : start + count]
    assert int(retries) == before, "a short read is no failure"


def test_a_stale_handle_is_not_used_again(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalFiles(patience_s=60)
    assert store.read(path, 0, 3) == DATA[:3]
    with open(f"{path}.new", "wb") as new:
        new.write(DATA[::-1])
    os.replace(f"{path}.new", path)
    assert store.read(path, 0, 3) == DATA[:3], "the file that was open"
    fail(monkeypatch, "pread", [errno.ESTALE])
    assert store.read(path, 0, 3) == DATA[::-1][:3]
