"""Servers that know no ranges: a file comes once, in one stream, or an error says what to do."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files import web as faults
from tests.files.test_http import DATA, fast
from tests.files.web import Web, served
from vitscale.errors import ConfigError
from vitscale.files import disk_cache, http, stores, stream
from vitscale.files.http import HttpFiles
from vitscale.files.store import OnePass
from vitscale.files.stores import Stores

__all__ = ["fast"]  # the fixture
NAME = "/d/a.tar"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Of files that are many times the window."""
    monkeypatch.setattr(stream, "WINDOW", 40_000)
    monkeypatch.setattr(http, "WINDOW", 40_000)
    monkeypatch.setattr(disk_cache, "_PIECE", 10_000)
    monkeypatch.setattr(stores, "_PIECE", 5_000)
    with served() as server:
        server.files[NAME] = DATA
        server.faults[NAME] = [faults.whole_without_ranges] * 1000
        yield server


@pytest.mark.parametrize("cuts", [0, 2])
def test_into_a_cache_it_comes_in_one_stream(web: Web, tmp_path: Path, cuts: int) -> None:
    web.faults[NAME][1 : 1 + cuts] = [cut_whole(100_000 * each) for each in range(1, 1 + cuts)]
    store = pickle.loads(pickle.dumps(Stores(str(tmp_path / "cache"))))
    store.fetch(f"{web.url}{NAME}", hashlib.sha256(DATA).hexdigest())
    assert store.read(f"{web.url}{NAME}", 123_456, 1000) == DATA[123_456:124_456]
    assert len(web.requests) == 2 + cuts, "stat, and the stream"


def cut_whole(count: int) -> faults.Misbehave:
    def fault(handler: faults.Handler, data: bytes, start: int, end: int) -> bool:
        handler.answer(200, {"ETag": faults.ETAG, "Last-Modified": faults.CHANGED}, data[:count], length=len(data))
        handler.close_connection = True
        return True

    return fault


def test_one_pass_is_one_stream_without_a_cache(web: Web) -> None:
    passed = OnePass(Stores(), f"{web.url}{NAME}")
    assert passed.read(f"{web.url}{NAME}", 70_000, 500) == DATA[70_000:70_500]
    assert passed.sha256() == hashlib.sha256(DATA).hexdigest()
    assert len(web.requests) == 2


def test_parts_here_and_there_need_a_cache(web: Web) -> None:
    store, url = Stores(), f"{web.url}{NAME}"
    store.stat(url)
    with pytest.raises(ConfigError, match=r"a\.tar: its server sends whole files alone .* set data\.cache=FOLDER"):
        store.read(url, 200_000, 10)
    assert store.read(url, 0, 10) == DATA[:10]
    with pytest.raises(ConfigError, match="whole files alone"):
        Stores().read(url, 200_000, 10)


def test_small_files_are_held_while_they_are_read(web: Web) -> None:
    web.files[NAME] = DATA[:30_000]
    store, url = HttpFiles(), f"{web.url}{NAME}"
    store.stat(url)
    for start in (20_000, 3, 15_000, 29_990, 0):
        assert store.read(url, start, 100) == DATA[:30_000][start : start + 100]
    assert len(web.requests) == 2


def test_a_server_that_had_to_look_first_sends_ranges_later(web: Web) -> None:
    """As caches before servers do that fetch the whole file for the first who asks."""
    store, url = HttpFiles(), f"{web.url}{NAME}"
    store.stat(url)
    web.faults[NAME] = []
    assert store.read(url, 200_000, 1000) == DATA[200_000:201_000]
    assert store.read(url, 100_000, 1000) == DATA[100_000:101_000]


def test_a_file_that_changed_is_not_taken_from_an_old_stream(web: Web) -> None:
    store, url = HttpFiles(), f"{web.url}{NAME}"
    store.stat(url)
    store.read(url, 0, 10)
    web.files[NAME] = DATA[1:]
    store.stat(url)
    assert store.read(url, 0, 10) == DATA[1:11]
