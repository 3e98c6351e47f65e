"""Remote files on this node's disk: one download for all, whole or not there, within its bounds."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.files import web as faults
from tests.files.web import Web, served
from vitscale.errors import ConfigError, DataError, StorageError
from vitscale.files import disk_cache, http, retry, stores, stream
from vitscale.files.disk_cache import DiskCache
from vitscale.files.http import HttpFiles
from vitscale.files.store import sha256_of
from vitscale.files.stores import Stores
from vitscale.world import host

DATA = {f"/{name}.tar": np.random.default_rng(seed).bytes(100_000) for seed, name in enumerate("abc")}


@pytest.fixture
def web() -> Iterator[Web]:
    with served() as server:
        server.files |= DATA
        yield server


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.005)
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 0.02)
    monkeypatch.setattr(disk_cache, "_PIECE", 9_000)


def cache(folder: Path, most_bytes: int | None = None) -> DiskCache:
    return DiskCache(HttpFiles(patience_s=5), str(folder / "cache"), most_bytes)


def whole(web: Web) -> int:
    """How many times the bytes of one file were sent."""
    return sum(int(each.split("-")[1]) > 0 and each.startswith("bytes=0-") for _, each in web.requests if each)


def test_a_file_is_downloaded_once_for_threads_and_processes(web: Web, tmp_path: Path) -> None:
    store, url = cache(tmp_path), f"{web.url}/a.tar"
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: store.read(url, at, 1000), range(0, 100_000, 1000)))
    assert b"".join(parts) == DATA["/a.tar"]
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_read, args=(store, url)) for _ in range(4)]
    for each in others:
        each.start()
    for each in others:
        each.join()
        assert each.exitcode == 0
    assert whole(web) == 1
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".data", ".json", ".lock"]


def _read(store: DiskCache, url: str) -> None:
    assert pickle.loads(pickle.dumps(store)).read(url, 5, 10) == DATA["/a.tar"][5:15]


def test_faults_of_the_server_do_not_show(web: Web, tmp_path: Path) -> None:
    web.faults["/a.tar"] = [lambda *_: False, faults.status(503), faults.cut_after(4_000), faults.hang_up]
    assert cache(tmp_path).read(f"{web.url}/a.tar", 0, 100_000) == DATA["/a.tar"]


def test_the_sha256_of_the_index_is_held_against_it(web: Web, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA["/a.tar"])
    good, url = sha256_of(tmp_path / "a"), f"{web.url}/a.tar"
    with pytest.raises(DataError, match=r"a\.tar: has another sha256 than the index says"):
        cache(tmp_path).fetch(url, "0" * 64)
    assert list((tmp_path / "cache").glob("*.data")) == list((tmp_path / "cache").glob("*.part")) == []
    store = cache(tmp_path)
    store.fetch(url, good)
    assert store.read(url, 0, 10) == DATA["/a.tar"][:10]


def test_the_ones_used_longest_ago_go_first(web: Web, tmp_path: Path) -> None:
    store = cache(tmp_path, 250_000)
    for name in ("a", "b", "a", "c"):
        assert store.read(f"{web.url}/{name}.tar", 0, 9) == DATA[f"/{name}.tar"][:9]
        time.sleep(0.02)
        if name == "b":
            os.utime(next(_data_of(tmp_path, f"{web.url}/a.tar")))
            time.sleep(0.02)
    held = {json.loads(path.read_text())["of"].rpartition("/")[2] for path in (tmp_path / "cache").glob("*.json")}
    assert held == {"a.tar", "c.tar"}
    assert store.read(f"{web.url}/b.tar", 0, 9) == DATA["/b.tar"][:9]  # its open file, or anew


def _data_of(folder: Path, url: str) -> Iterator[Path]:
    for path in (folder / "cache").glob("*.json"):
        if json.loads(path.read_text())["of"] == url:
            yield path.with_suffix(".data")


def test_a_file_that_another_process_threw_out_is_fetched_again(web: Web, tmp_path: Path) -> None:
    store, url = cache(tmp_path), f"{web.url}/a.tar"
    store.fetch(url, None)
    for ask in (lambda: store.read(url, 0, 9), lambda: store.fetch(url, None)):  # fetched ahead too, as in a new epoch
        file = next(_data_of(tmp_path, url))
        file.unlink()
        ask()
        assert file.read_bytes() == DATA["/a.tar"]


@pytest.mark.parametrize("damage", ["cut", "altered after a restart", "no json", "junk json"])
def test_what_is_not_whole_is_not_used(web: Web, tmp_path: Path, damage: str) -> None:
    url = f"{web.url}/a.tar"
    cache(tmp_path).fetch(url, None)
    path = next(_data_of(tmp_path, url))
    about = path.with_suffix(".json")
    if damage == "cut":
        os.truncate(path, 99_999)
    elif damage == "altered after a restart":
        path.write_bytes(b"x" * 100_000)
        about.write_text(json.dumps(json.loads(about.read_text()) | {"boot": "another"}))
    elif damage == "no json":
        about.unlink()
    else:
        about.write_text("[]")
    assert cache(tmp_path).read(url, 0, 100_000) == DATA["/a.tar"]


def test_after_a_restart_whole_files_are_used(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/a.tar"
    cache(tmp_path).fetch(url, None)
    about = next(_data_of(tmp_path, url)).with_suffix(".json")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"boot": "another"}))
    assert cache(tmp_path).read(url, 0, 9) == DATA["/a.tar"][:9]
    assert whole(web) == 1


def test_a_file_that_changed_at_its_server_is_another(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/a.tar"
    cache(tmp_path).fetch(url, None)
    web.files["/a.tar"] = DATA["/b.tar"] + b"more"
    assert cache(tmp_path).read(url, 0, 9) == DATA["/b.tar"][:9]


def test_a_kill_in_the_middle_leaves_nothing_stale(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/a.tar"
    web.faults["/a.tar"] = [lambda *_: False, lambda *_: False, faults.stall_after(0, 60)]
    context = multiprocessing.get_context("fork")
    process = context.Process(target=cache(tmp_path).fetch, args=(url, None))
    process.start()
    deadline = time.monotonic() + 30
    while not list((tmp_path / "cache").glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert [path.suffix for path in (tmp_path / "cache").glob("*.data")] == []
    web.faults.clear()
    assert cache(tmp_path).read(url, 0, 100_000) == DATA["/a.tar"]
    assert list((tmp_path / "cache").glob("*.part")) == []


def test_bounds_and_folders_that_cannot_be(web: Web, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.cache_bytes=99999: .*a.tar alone has 100000"):
        cache(tmp_path, 99_999).fetch(f"{web.url}/a.tar", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache=.*file/cache: cannot be used .*, or set data.cache=null"):
        cache(tmp_path / "file").fetch(f"{web.url}/a.tar", None)
    with pytest.raises(FileNotFoundError, match="HTTP 404"):
        cache(tmp_path).read(f"{web.url}/none.tar", 0, 9)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_makes_the_cache_smaller_or_is_a_line(web: Web, tmp_path: Path) -> None:
    small = tmp_path / "cache"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=240k tmpfs {small} 2>/dev/null") != 0:
        pytest.skip("cannot mount a file system here")
    try:
        store = cache(tmp_path, 10**9)
        for name in ("a", "b", "c"):
            assert store.read(f"{web.url}/{name}.tar", 0, 100_000) == DATA[f"/{name}.tar"]
        assert 1 <= len(list(small.glob("*.data"))) <= 2
        for _ in range(5):  # more downloads at once than there is room for
            for path in small.glob("*"):
                path.unlink()
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda name: store.fetch(f"{web.url}/{name}.tar", None), "abc"))
        for path in small.glob("*"):
            path.unlink()
        (small / "somebodys").write_bytes(b"x" * 200_000)
        with pytest.raises(ConfigError, match="its disk is full, and nothing in it is of this cache"):
            cache(tmp_path, 10**9).fetch(f"{web.url}/a.tar", None)
    finally:
        os.system(f"umount -l {small}")


def test_a_cache_smaller_than_what_many_threads_read(web: Web, tmp_path: Path) -> None:
    """Files go while others are about to use them; what is read is right all the same."""
    store = cache(tmp_path, 200_000)

    def read(turn: int) -> None:
        name = f"/{'abc'[turn % 3]}.tar"
        assert store.read(f"{web.url}{name}", turn * 100, 1000) == DATA[name][turn * 100 : turn * 100 + 1000]
        store.fetch(f"{web.url}/{'abc'[(turn + 1) % 3]}.tar", None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(120)))


def test_what_a_killed_process_left_behind_goes_with_the_next_download(web: Web, tmp_path: Path) -> None:
    store, folder = cache(tmp_path, 250_000), tmp_path / "cache"
    folder.mkdir()
    (folder / f"{'0123' * 8}.part").write_bytes(bytes(100_000))
    (folder / f".{'0123' * 8}.json.0123456789ab.tmp").touch()
    (folder / f"{'4567' * 8}.lock").touch()
    for name in "abc":
        store.read(f"{web.url}/{name}.tar", 0, 10)
    held = sorted(path.suffix for path in folder.iterdir() if path.name != "cache.lock")
    assert held == [".data"] * 2 + [".json"] * 2 + [".lock"] * 3, "the third one's goes with the next download"
    assert not [path for path in folder.iterdir() if "0123" * 8 in path.name]
    assert not (folder / f"{'4567' * 8}.lock").exists()


def test_what_others_keep_in_the_folder_stays(web: Web, tmp_path: Path) -> None:
    store, folder = cache(tmp_path, 150_000), tmp_path / "cache"
    folder.mkdir()
    theirs = [folder / name for name in ("scan.data", "scan.json", "film.part", "browser.lock")]
    for path in theirs:
        path.write_bytes(bytes(100_000))
        os.utime(path, (1, 1))
    for name in "abc":
        store.read(f"{web.url}/{name}.tar", 0, 10)
    assert all(path.exists() for path in theirs)
    assert len(set(folder.glob("*.data"))) == 2, "theirs, and the last of ours"


def test_a_server_that_tells_an_etag_alone(web: Web, tmp_path: Path) -> None:
    """Another file of the same size is another file."""
    other = bytes(100_000)
    web.faults["/a.tar"] = [faults.with_headers(Last_Modified="")] * 3
    assert cache(tmp_path).read(f"{web.url}/a.tar", 0, 10) == DATA["/a.tar"][:10]
    web.files["/a.tar"] = other
    web.faults["/a.tar"] = [faults.with_headers(Last_Modified="", ETag='"two"')] * 30
    assert cache(tmp_path).read(f"{web.url}/a.tar", 0, 10) == other[:10]


NO_BYTES = Path("/proc/self/mem")  # a real file that gives EIO, read or written: nothing is mapped at its first byte


def test_bytes_that_the_disk_does_not_give_are_downloaded_again(
    web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, url = cache(tmp_path), f"{web.url}/a.tar"
    store.fetch(url, None)
    file = next(_data_of(tmp_path, url))
    file.unlink()
    file.symlink_to(NO_BYTES)
    with ThreadPoolExecutor(8) as pool:  # all of them meet the fault
        parts = list(pool.map(lambda at: store.read(url, at, 1000), range(0, 100_000, 1000)))
    assert b"".join(parts) == DATA["/a.tar"]
    assert file.read_bytes() == DATA["/a.tar"]
    assert not file.is_symlink()
    about = file.with_suffix(".json")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": "0" * 64}))
    store.fetch(url, None)
    assert whole(web) == 2, "once it was mended it is not hashed at every fetch"
    assert capfd.readouterr().err == ""


def test_a_disk_that_goes_on_failing_is_done_without(
    web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, url = Stores(str(tmp_path / "cache"), patience_s=0.3), f"{web.url}/a.tar"
    store.fetch(url, None)
    file = next(_data_of(tmp_path, url))
    file.unlink()
    file.symlink_to(NO_BYTES)
    file.with_suffix(".part").symlink_to(NO_BYTES)  # what is downloaded cannot be written either
    for name in ("a", "b"):
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(partial(store.read, f"{web.url}/{name}.tar", count=1000), range(0, 100_000, 1000)))
        assert b"".join(parts) == DATA[f"/{name}.tar"]
    store.fetch(f"{web.url}/c.tar", None)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: data.cache={tmp_path}/cache: the disk of {host()} fails (Input/output error)")
    web.faults["/c.tar"] = [faults.status(503)] * 1000
    with pytest.raises(StorageError, match=rf"data.cache=.*: the disk of {host()} fails .*/c\.tar cannot be read"):
        store.read(f"{web.url}/c.tar", 0, 9)


def test_where_a_server_knows_no_ranges_the_node_is_named(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (stream, http):
        monkeypatch.setattr(module, "WINDOW", 20_000)
    monkeypatch.setattr(stores, "_PIECE", 10_000)
    store, url = Stores(str(tmp_path / "cache")), f"{web.url}/a.tar"
    web.faults["/a.tar"] = [faults.whole_without_ranges] * 1000
    store.fetch(url, None)
    file = next(_data_of(tmp_path, url))
    file.unlink()
    file.with_suffix(".part").symlink_to(NO_BYTES)
    with pytest.raises(StorageError, match=rf"the disk of {host()} fails .* whole files alone .*; start the run again"):
        store.read(url, 90_000, 9)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_was_made_read_only_is_done_without(
    web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    if os.system(f"mount -t tmpfs tmpfs {folder} 2>/dev/null") != 0:
        pytest.skip("cannot mount a file system here")
    try:
        store = cache(tmp_path)
        store.fetch(f"{web.url}/a.tar", None)
        assert os.system(f"mount -o remount,ro {folder}") == 0
        for name in ("a", "b"):
            assert store.read(f"{web.url}/{name}.tar", 0, 100_000) == DATA[f"/{name}.tar"]
        assert "fails (Read-only file system)" in capfd.readouterr().err
    finally:
        os.system(f"umount -l {folder}")


def test_a_file_that_is_read_is_not_the_one_used_longest_ago(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cache(tmp_path, 250_000)
    old = time.time() - 7200
    for name in ("a", "b"):
        store.read(f"{web.url}/{name}.tar", 0, 9)
        os.utime(next(_data_of(tmp_path, f"{web.url}/{name}.tar")), (old, old))
        old += 3600  # b was opened later
    store.read(f"{web.url}/a.tar", 0, 9)
    file = next(_data_of(tmp_path, f"{web.url}/a.tar"))
    assert file.stat().st_mtime < time.time() - 7000, "not again within the minute"
    monkeypatch.setattr(disk_cache, "_TOUCHED_EVERY_S", 0.0)
    store.read(f"{web.url}/a.tar", 0, 9)
    store.read(f"{web.url}/c.tar", 0, 9)
    assert file.exists()
    assert list(_data_of(tmp_path, f"{web.url}/b.tar")) == []
