"""Tables beside shards: made once, whoever needs them; trusted only while they hold."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.makers import photo, write_shards, write_tar
from tests.data.stores import CountingFiles
from vitscale.config.schema import Source
from vitscale.data import parallel, sidecar
from vitscale.data.index import ShardIndex, open_index
from vitscale.data.shards import Shards
from vitscale.data.sidecar import FOLDER
from vitscale.data.table import from_bytes
from vitscale.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards that nobody has looked at."""
    (tmp_path / "shards").mkdir()
    for shard, count in enumerate([3, 5, 2]):
        members = [
            (f"{shard}{i}.{kind}", data) for i in range(count) for kind, data in (("jpg", photo(i)), ("cls", b"%d" % i))
        ]
        write_tar(tmp_path / "shards" / f"s{shard:03d}.tar", members)
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def _no_reports_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "_reports", itertools.count())


def opened(folder: Path, store: CountingFiles | None = None, label: str = "cls") -> ShardIndex:
    source = (Source(f"{folder}/*.tar"),)
    return open_index(source, None, folder.parent / "run", label=label, store=store or CountingFiles())


def untouched(folder: Path) -> ShardIndex:
    """An index of shards that have no tables yet, as one that was copied without them."""
    index, _ = again(opened(folder))
    shutil.rmtree(folder / FOLDER)
    return index


def again(index: ShardIndex) -> tuple[ShardIndex, CountingFiles]:
    """The same index for a new start, with nothing asked yet."""
    store = CountingFiles()
    return replace(index, store=store), store


def test_the_scan_that_counts_leaves_the_tables(folder: Path) -> None:
    store = CountingFiles()
    index = opened(folder, store)
    assert sorted(os.listdir(folder / FOLDER)) == [f"s00{i}.tar.cls.table" for i in range(3)]
    headers = dict(store.headers)
    assert len(headers) == 2 * 10 + 3, "a header a member, and the end marker of each"
    labels = [index.table(1, "cls").label_text(i) for i in range(5)]
    assert labels == [b"0", b"1", b"2", b"3", b"4"]
    assert dict(store.headers) == headers
    assert set(headers.values()) == {1}


def test_labels_are_never_read_again(folder: Path) -> None:
    index, store = again(opened(folder))
    raw = Shards(index, "cls", 100).read(1 << 32 | 3)
    assert (raw.shard, raw.key, raw.label) == ("s001", "13", b"3")
    assert raw.image == photo(3)
    asked = [(Path(path).name, count) for path, _, count in store.reads]
    assert asked[1:] == [("s001.tar", len(photo(3)))], "after the table, the image alone"


def test_a_table_is_filled_when_its_shard_is_first_needed(folder: Path) -> None:
    index = untouched(folder)
    Shards(index, "cls", 100).read(2 << 32)
    assert os.listdir(folder / FOLDER) == ["s002.tar.cls.table"]


def test_another_label_gets_a_table_of_its_own(folder: Path) -> None:
    index = opened(folder)
    assert index.table(0, "jpg").label_bytes.tolist() == [len(photo(i)) for i in range(3)]
    assert index.table(0, "jpg").label_text(0) is None, "too long to be kept"
    assert {"s000.tar.cls.table", "s000.tar.jpg.table"} <= set(os.listdir(folder / FOLDER))
    index, store = again(index)
    assert index.table(0, "cls").label_text(2) == b"2"
    assert not store.headers


def test_a_label_is_no_path(folder: Path) -> None:
    index = opened(folder, label="../../x")
    assert len(os.listdir(folder / FOLDER)) == 3
    assert index.table(0, "../../x").label_bytes.tolist() == [-1] * 3


def damage_length(data: bytes) -> bytes:
    return data[:17] + b"\xff" * 7 + data[24:]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: data[:-1], "bytes"),
        (lambda data: data[: len(data) // 2] + b"x" + data[len(data) // 2 + 1 :], "digest"),
        (lambda data: b"", "no table"),
        (lambda data: b"vitscale-table-1" + data[16:], "no table of this version"),
        (damage_length, "bytes"),
    ],
)
def test_a_damaged_table_is_told_and_made_again(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: object, word: str
) -> None:
    index, store = again(opened(folder))
    path = folder / FOLDER / "s001.tar.cls.table"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))  # type: ignore[operator]
    assert [index.table(1, "cls").key(i) for i in range(5)] == ["10", "11", "12", "13", "14"]
    assert path.read_bytes() == whole
    told = capsys.readouterr().err
    assert str(path) in told
    assert word in told
    assert told.count("\n") == 1
    assert {Path(shard).name for shard, _ in store.headers} == {"s001.tar"}


def test_a_table_of_another_shard_is_not_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, _ = again(opened(folder))
    tables = folder / FOLDER
    (tables / "s001.tar.cls.table").write_bytes((tables / "s000.tar.cls.table").read_bytes())
    assert len(index.table(1, "cls")) == 5
    assert "another state" in capsys.readouterr().err


def test_a_shard_of_the_same_size_but_a_later_time_is_scanned_again(folder: Path) -> None:
    index, _ = again(opened(folder))
    members = [(f"x{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", photo(i)), ("cls", b"7"))]
    size = os.path.getsize(folder / "s000.tar")
    assert os.path.getsize(write_tar(folder / "s000.tar", members)) == size
    table = index.table(0, "cls")
    assert [table.label_text(i) for i in range(3)] == [b"7"] * 3
    assert table.key(0) == "x0"


@pytest.mark.parametrize("whole_seconds, tick", [(False, 20_000_000), (True, 2_000_000_000)])
def test_a_shard_just_written_is_left_to_settle(tmp_path: Path, whole_seconds: bool, tick: int) -> None:
    """File times tick every few milliseconds, or seconds: what is written after the scan must get a later one."""

    class Timed(CountingFiles):
        first = 0

        def read(self, path: str, start: int, count: int) -> bytes:
            if path.endswith(".tar"):
                self.first = self.first or time.time_ns()
            return super().read(path, start, count)

    path, store = write_tar(tmp_path / "a.tar", [("1.jpg", b"x")]), Timed()
    now = time.time_ns()
    modified = now - now % 1_000_000_000 if whole_seconds else now | 1
    os.utime(path, ns=(modified, modified))
    open_index((Source(str(path)),), None, tmp_path / "run", store=store)
    assert store.first - modified >= tick


def test_a_count_that_the_index_denies_is_looked_at_again(folder: Path) -> None:
    index, store = again(opened(folder))
    lying = replace(index, samples=np.array([3, 4, 2]))
    with pytest.raises(DataError, match=r"s001.tar: holds 5 samples, the index says 4"):
        lying.table(1, "cls")
    assert store.headers, "not the table alone was asked"


def test_where_shards_cannot_be_written_the_runs_folder_keeps_the_tables(folder: Path) -> None:
    store = CountingFiles(read_only=str(folder))
    index = opened(folder, store)
    assert sorted(os.listdir(folder)) == ["s000.tar", "s001.tar", "s002.tar"]
    (tables,) = (folder.parent / "run").glob("index-*.tables")
    assert len(list(tables.iterdir())) == 3
    second = CountingFiles(read_only=str(folder))
    assert len(opened(folder, second).table(1, "cls")) == 5
    assert not second.headers
    assert index.total == 10


def test_an_old_table_beside_a_shard_does_not_hide_the_one_in_the_runs_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(folder)
    os.utime(folder / "s001.tar", ns=(1, 1))
    for headers in (2 * 5 + 1, 0):
        store = CountingFiles(read_only=str(folder))
        assert opened(folder, store).table(1, "cls").key(0) == "10"
        assert len(store.headers) == headers
    assert capsys.readouterr().err.count("another state") == 1, "not at the second start"


def test_a_shard_with_a_long_name_has_a_table_too(folder: Path) -> None:
    name = "x" * 236 + ".tar"
    for path in folder.iterdir():
        path.rename(folder / name)
    opened(folder)
    assert os.listdir(folder / FOLDER) == [f"{name}.cls.table"]


def test_where_nothing_can_be_written_it_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = replace(opened(folder), fallback_folders=())
    (folder / FOLDER / "s000.tar.cls.table").unlink()
    index = replace(index, store=CountingFiles(read_only=str(folder)))
    assert len(index.table(0, "cls")) == 3
    assert "s000.tar: its table cannot be kept" in capsys.readouterr().err


def test_many_make_the_same_table_at_once(folder: Path) -> None:
    index = opened(folder)
    path = folder / FOLDER / "s001.tar.cls.table"
    path.unlink()
    start = threading.Barrier(8)

    def one(_: int) -> list[str]:
        mine, _ = again(index)
        start.wait()
        table = mine.table(1, "cls")
        return [table.key(i) for i in range(len(table))]

    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(one, range(8)))
    assert keys == [["10", "11", "12", "13", "14"]] * 8
    assert len(from_bytes(path.read_bytes())) == 5
    assert len(os.listdir(folder / FOLDER)) == 3, "no temporary files are left"


@pytest.mark.parametrize("worth_a_process", [1, 1 << 40])
def test_all_tables_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch, worth_a_process: int) -> None:
    """In processes and in threads."""
    monkeypatch.setattr(parallel, "_WORTH_A_PROCESS", worth_a_process)
    monkeypatch.setattr(parallel, "_REPORT_EVERY_S", 0.0)
    index = opened(folder)
    for name in ("s000", "s002"):
        (folder / FOLDER / f"{name}.tar.cls.table").unlink()
    lines: list[str] = []
    index.complete_tables("cls", lines.append)
    assert lines[-1].startswith("tables: 3 of 3 shards, ")
    index, store = again(index)
    assert [len(index.table(i, "cls")) for i in range(3)] == [3, 5, 2]
    assert not store.headers
    (folder / "s001.tar").write_bytes(bytes(index.bytes[1]))
    with pytest.raises(DataError, match=r"s001\.tar: holds no sample"):
        index.complete_tables("cls", lines.append)
    (folder / "s001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"s001\.tar: has 0 bytes, the index says"):
        index.complete_tables("cls", lines.append)


def test_nodes_begin_at_different_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_THREADS", 1)
    begun = set()
    for node in range(12):
        monkeypatch.setattr("socket.gethostname", lambda node=node: f"node-{node}")
        store = CountingFiles()
        assert opened(folder, store).samples.tolist() == [3, 5, 2]
        begun.add(next(iter(store.headers))[0])
        for path in [folder / "index.json", *(folder / FOLDER).iterdir()]:
            path.unlink()
    assert len(begun) == 3


def test_tables_to_come_are_fetched_in_the_background(folder: Path) -> None:
    index = untouched(folder)
    store = index.store
    assert isinstance(store, CountingFiles)
    shards = Shards(index, "cls", 100)
    shards.fetch([2, 0])
    deadline = time.monotonic() + 10
    while not {f"s00{i}.tar.cls.table" for i in (0, 2)} <= _tables(folder) and time.monotonic() < deadline:
        time.sleep(0.002)
    shards.read(0)
    shards.read(2 << 32)
    assert all(name.startswith("tables") for name in store.readers)
    shards.read(1 << 32)
    assert threading.current_thread().name in store.readers


def test_what_cannot_be_fetched_is_told_by_who_reads_it(folder: Path) -> None:
    index = opened(folder)
    (folder / "s001.tar").unlink()
    shards = Shards(index, "cls", 100)
    shards.fetch([1, 0])
    for _ in range(2):
        with pytest.raises(DataError, match=r"s001.tar.*No such file"):
            shards.read(1 << 32)
    assert shards.read(0).key == "00"


def _tables(folder: Path) -> set[str]:
    return set(os.listdir(folder / FOLDER)) if (folder / FOLDER).exists() else set()


def test_pack_and_build_leave_tables(tmp_path: Path) -> None:
    index, store = again(write_shards(tmp_path, [3, 2]))
    assert [len(index.table(i, "cls")) for i in range(2)] == [3, 2]
    assert not store.headers


def test_names_in_a_shard_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [("a.jpg", photo(0)), ("\x1b[2J\n/.hidden", b"")]
    opened(write_tar(tmp_path / "s.tar", members).parent)
    told = r"s.tar: 1 members belong to no sample, as \x1b[2J\n/.hidden: they are passed over"
    assert capsys.readouterr().err == f"{tmp_path}/{told}\n"


def test_further_images_of_a_sample_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "s.tar", [("a.jpg", photo(0)), ("a.mask.jpg", photo(1)), ("b.jpg", photo(2))])
    opened(tmp_path)
    told = "s.tar: 1 further images in samples that have one, as a.mask.jpg: they are passed over; data.image names the"
    assert told in capsys.readouterr().err
