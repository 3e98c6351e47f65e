from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.makers import write_shards, write_tar
from tests.data.stores import CountingFiles
from tests.files.web import served
from vitscale.config.schema import Source
from vitscale.data import index_builder
from vitscale.data.index import ShardIndex, build_index, open_index, require_labels
from vitscale.data.patterns import expand
from vitscale.errors import ConfigError, DataError
from vitscale.files.store import FileStat, LocalFiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [3, 5, 2])
    return tmp_path / "shards"


def opened(folder: Path, pattern: str = "*.tar", index: str | None = None) -> ShardIndex:
    return open_index((Source(f"{folder}/{pattern}"),), index, folder.parent / "run")


def test_counts_come_from_the_headers(folder: Path) -> None:
    index = opened(folder)
    assert index.names == ("s000", "s001", "s002")
    assert index.samples.tolist() == [3, 5, 2]
    assert index.total == 10
    assert index.bytes.tolist() == [os.path.getsize(path) for path in index.paths]


def test_patterns(folder: Path) -> None:
    paths = [f"{folder}/s{i:03d}.tar" for i in range(3)]
    for pattern in ("*.tar", "s{000..002}.tar", "s00[0-2].tar", "s{000,001,002}.tar", "s00{0..2}.t?r"):
        assert expand([Source(f"{folder}/{pattern}")]) == paths
    assert expand([Source(f"file:{paths[1]}"), Source(f"file://{paths[0]}")]) == [paths[1], paths[0]]


def test_what_is_kept_beside_shards_is_none_of_them(folder: Path) -> None:
    """A start leaves an index and tables there; the next start's pattern may match these too."""
    for _ in range(2):
        assert opened(folder, "*").names == ("s000", "s001", "s002")
        assert sorted(os.listdir(folder))[:2] == ["index.json", "index.tables"]


def test_names_that_look_like_patterns_are_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "set [2024] (a)" / "a*b" / "{0..1}"
    odd.mkdir(parents=True)
    (tmp_path / "set [2024] (a)" / "axb" / "{0..1}").mkdir(parents=True)
    for where in (odd / "x[1].tar", odd / "y.tar", odd.parents[1] / "axb" / "{0..1}" / "z.tar"):
        shutil.copy(folder / "s000.tar", where)
    assert expand((Source(f"{odd}/*.tar"),)) == [f"{odd}/x[1].tar", f"{odd}/y.tar"]
    assert expand((Source(f"{odd}/x[1].tar"),)) == [f"{odd}/x[1].tar"]
    assert expand((Source(f"{odd}/{{y,x[[]1]}}.tar"),)) == [f"{odd}/y.tar", f"{odd}/x[1].tar"]
    monkeypatch.setenv("HOME", str(odd))
    assert expand((Source("~/y.tar"),)) == [f"{odd}/y.tar"]
    monkeypatch.chdir(odd)
    assert expand((Source("y.tar"), Source("./x*.tar"))) == [f"{odd}/y.tar", f"{odd}/./x[1].tar"]


def test_paths_that_look_like_urls_are_paths_where_they_are_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "scan:2024")
    for number in range(2):
        shutil.copy(folder / "s000.tar", f"set:{number}.tar")
    names = [f"{tmp_path}/scan:2024/s{number:03d}.tar" for number in range(3)]
    for pattern in ("scan:2024/*.tar", "scan:2024/s{000..002}.tar"):
        assert expand([Source(pattern)]) == names
    for pattern in ("set:{0..1}.tar", "set:*.tar"):
        assert expand([Source(pattern)]) == [f"{tmp_path}/set:0.tar", f"{tmp_path}/set:1.tar"]
    assert expand([Source("set:1.tar")]) == [f"{tmp_path}/set:1.tar"]
    with pytest.raises(DataError, match=r"scan:2024/none\.tar: no such file"):
        opened(Path("scan:2024"), "none.tar")
    with pytest.raises(DataError, match="scan: is not read"):
        expand([Source("scan:2025/*.tar")])


@pytest.mark.parametrize(
    "pattern, word",
    [
        ("FOLDER/none-*.tar", "none-*.tar"),
        ("FOLDER/s{000..003}.tar", "s003.tar"),
        ("pipe:touch FOLDER/pwned; cat FOLDER/s000.tar", "pipe: is not read (pipe: would run a command)"),
        ("ftp://example.com/a.tar", "ftp: is not read"),
        ("http://no-such-host.invalid/a.tar", "no host of that name"),
        ("FOLDER/s{0..99999999999}.tar", "braces"),
        ("FOLDER/s{0..9999}{0..9999}{0..9999}.tar", "braces"),
        ("FOLDER/s{000..002.tar", "Unbalanced"),
        (
            "FOLDER",
            "is a folder; name the shards in it, say 'FOLDER/*.tar' (of a folder of images, `",
        ),
        ("FOLDER/", "'FOLDER/*.tar'"),
    ],
)
def test_patterns_that_name_no_local_shards(folder: Path, pattern: str, word: str) -> None:
    with pytest.raises(DataError) as caught:
        open_index((Source(pattern.replace("FOLDER", str(folder))),), None, folder.parent / "run")
    assert word.replace("FOLDER", str(folder)) in str(caught.value)
    assert not (folder / "pwned").exists()


def test_a_shard_twice_and_no_shard_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        open_index((Source(f"{folder}/*.tar"), Source(f"{folder}/../shards/s001.tar")), None, folder)
    with pytest.raises(DataError, match=r"data.train is empty"):
        open_index((), None, folder)
    with pytest.raises(DataError, match=r"evaluation.test='ftp://a/b.tar': ftp: is not read"):
        open_index((Source("ftp://a/b.tar"),), None, folder, key="evaluation.test")
    with pytest.raises(ConfigError, match=r"evaluation.test=http://a/b.tar: has a user or password"):
        open_index((Source("http://me:word@a/b.tar"),), None, folder, key="evaluation.test")
    with pytest.raises(DataError, match=r"s001.tar: is named twice by evaluation.test"):
        open_index((Source(f"{folder}/{{s001,s001}}.tar"),), None, folder, key="evaluation.test")


def test_the_scan_is_kept_beside_the_shards_and_taken_while_fresh(folder: Path) -> None:
    opened(folder)
    kept = json.loads((folder / "index.json").read_text())
    kept["shards"][1]["samples"] = 4  # a lie that only who trusts the cache repeats
    (folder / "index.json").write_text(json.dumps(kept))
    assert opened(folder).samples.tolist() == [3, 4, 2]
    os.utime(folder / "s001.tar", ns=(1, 1))
    assert opened(folder).samples.tolist() == [3, 5, 2]


def test_a_shard_that_grew_is_scanned_again(folder: Path) -> None:
    before = opened(folder)
    os.utime(write_tar(folder / "s001.tar", [(f"{i}.jpg", bytes(5000)) for i in range(7)]), ns=(1, 1))
    after = opened(folder)
    assert after.samples.tolist() == [3, 7, 2]
    assert after.digest != before.digest


def test_a_packers_hash_outlives_a_copy(folder: Path) -> None:
    packed = build_index(expand([Source(f"{folder}/*.tar")]))
    packed.save(folder / "index.json")
    copy = shutil.copytree(folder, folder.parent / "copy", copy_function=shutil.copyfile)
    index = opened(copy)
    assert index.sha256 == packed.sha256
    assert all(index.sha256)
    assert index.digest == packed.digest


def test_a_part_of_the_shards_leaves_the_other_rows(folder: Path) -> None:
    opened(folder)
    os.utime(folder / "s002.tar", ns=(1, 1))
    assert opened(folder, "s002.tar").samples.tolist() == [2]
    assert len(json.loads((folder / "index.json").read_text())["shards"]) == 3


def test_another_tools_index_is_left_alone(folder: Path) -> None:
    (folder / "index.json").write_text('{"version": 2, "shards": []}')
    for _ in range(2):
        assert opened(folder).total == 10
    assert (folder / "index.json").read_text() == '{"version": 2, "shards": []}'
    (kept,) = (folder.parent / "run").iterdir()
    assert ShardIndex.load(kept).total == 10


def test_shards_in_many_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted at once, not a folder after the other; only folders that changed are searched."""
    for name in "abcde":
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "s.tar", [("1.jpg", b"x")])
    counted: list[int] = []
    count_samples = index_builder.count_samples
    monkeypatch.setattr(
        index_builder,
        "count_samples",
        lambda sidecar, shards, **_: (counted.append(len(shards)), count_samples(sidecar, shards))[1],
    )
    sources, listed = (Source(f"{tmp_path}/?/s.tar"),), []
    store = CountingFiles()
    store.list = lambda pattern: listed.append(pattern) or LocalFiles.list(store, pattern)  # type: ignore[method-assign]
    assert open_index(sources, None, tmp_path / "run", store=store).total == 5
    assert (counted, len(listed)) == ([5], 6)
    listed.clear()
    os.utime(tmp_path / "c" / "s.tar", ns=(1, 1))
    assert open_index(sources, None, tmp_path / "run", store=store).total == 5
    assert (counted, len(listed)) == ([5, 1], 2)
    assert all((tmp_path / name / "index.json").exists() for name in "abcde")


def test_where_no_index_can_be_kept_it_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "full").touch()
    sources = (Source(f"{folder}/*.tar"),)
    index = open_index(sources, None, folder.parent / "full", store=CountingFiles(read_only=f"{folder}/index.json"))
    assert index.total == 10
    told = capsys.readouterr().err
    assert told.startswith(f"{folder}/index.json: the index cannot be kept ([Errno ")
    assert told.count("\n") == 1


def test_an_index_file_by_name(folder: Path) -> None:
    path = folder.parent / "index.json"
    build_index(expand([Source(f"{folder}/*.tar")])).save(path)
    assert opened(folder, "s00[02].tar", str(path)).samples.tolist() == [3, 2]
    write_tar(folder / "s003.tar", [("a.jpg", b"")])
    with pytest.raises(DataError, match=r"no row for .*s003.tar"):
        opened(folder, "*.tar", str(path))
    write_tar(folder / "s000.tar", [("a.jpg", bytes(20000))])
    with pytest.raises(DataError, match=r"s000.tar: has \d+ bytes, data.index=.* says \d+"):
        opened(folder, "s00[0-2].tar", str(path))
    no_row = '{"format": "vitscale-index-1", "shards": [%s]}'
    for text in (
        "", "[]", "{}", "[" * 100_000, no_row % "5", no_row % '{"name": "a.tar", "samples": -1}',
        no_row % '{"name": 5, "samples": 1, "bytes": 1}',
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=r"data\.index"):
            opened(folder, "*.tar", str(path))


def test_an_index_file_serves_links_to_its_shards(folder: Path) -> None:
    """A folder of links is how a part of the shards is chosen."""
    opened(folder)
    (folder.parent / "chosen").mkdir()
    for name in ("s000.tar", "s002.tar"):
        (folder.parent / "chosen" / name).symlink_to(f"../shards/{name}")
    assert opened(folder.parent / "chosen", "*.tar", str(folder / "index.json")).samples.tolist() == [3, 2]


def test_relative_patterns_mean_the_same_to_all_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = folder.parent / "[x]{y}"
    odd.mkdir()
    monkeypatch.chdir(odd)
    index = open_index((Source("../shards/s*.tar"),), None, folder.parent / "run")
    monkeypatch.chdir("/")
    there = ShardIndex.from_bytes(index.to_bytes())
    assert [len(there.table(i, "cls")) for i in range(3)] == [3, 5, 2]
    assert (there.paths, there.digest) == (index.paths, index.digest)


def test_bad_shards_are_told_at_the_start(folder: Path) -> None:
    data = (folder / "s001.tar").read_bytes()
    (folder / "s001.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"s001.tar"):
        opened(folder)


def declare(folder: Path, count: int) -> None:
    """What img2dataset and open_clip leave beside shards; of s001 a count of ours."""
    (folder / "s000_stats.json").write_text('{"count": 9, "successes": 3, "failed_to_download": 6}')
    (folder / "s001_stats.json").write_text("[" * 99999)  # which says nothing
    (folder / "sizes.json").write_text(f'{{"s001.tar": {count}}}')


def test_declared_counts_are_held_against_the_shards_at_the_start(folder: Path) -> None:
    declare(folder, 6)
    with pytest.raises(DataError, match=r"s001.tar: holds 5 samples, .*/sizes.json says 6; delete that file if it"):
        opened(folder)
    with pytest.raises(DataError, match=r"s001.tar: holds 5 samples, .*/sizes.json says 6"):
        opened(folder)  # though there is a table now
    (folder / "sizes.json").unlink()
    assert opened(folder).samples.tolist() == [3, 5, 2]
    (folder / "index.json").unlink()
    (folder / "s000_stats.json").write_text('{"successes": 4}')
    with pytest.raises(DataError, match=r"s000.tar: holds 3 samples, .*/s000_stats.json says 4"):
        opened(folder)
    assert build_index(expand([Source(f"{folder}/*.tar")])).samples.tolist() == [3, 5, 2]  # the way out


def test_of_shards_at_urls_a_few_are_looked_at(folder: Path) -> None:
    """Which are read whole for it; the others are held to their counts when they are read."""
    write_shards(folder, [2] * 12)
    names = [f"s{i:03d}.tar" for i in range(12)]
    with served() as web:
        for name in names:
            web.files[f"/d/{name}"] = (folder / name).read_bytes()
        sources = (Source(f"{web.url}/d/s{{000..011}}.tar"),)

        def start(claims: dict[str, int]) -> ShardIndex:
            web.files["/d/sizes.json"] = json.dumps(claims).encode()
            return open_index(sources, None, folder.parent / "run")

        right = dict.fromkeys(names, 2)
        index = start(right | {"s001.tar": 3})
        assert index.samples.tolist() == [2, 3, *[2] * 10]
        kept = ShardIndex.load(next((folder.parent / "run").glob("index-*.json")))
        assert len(kept.names) == 4, "what nobody has counted is not kept as if it were"
        with pytest.raises(DataError, match=r"s001.tar: holds 2 samples, http.*/sizes.json says 3"):
            index.table(1, "cls")
        shutil.rmtree(folder.parent / "run")
        with pytest.raises(DataError, match=r"s\d+.tar: holds 2 samples, http.*/sizes.json says 3"):
            start(dict.fromkeys(names, 3))


def test_the_digest_does_not_depend_on_the_place(folder: Path) -> None:
    first = opened(folder)
    moved = folder.rename(folder.parent / "elsewhere")
    second = opened(moved)
    assert first.digest == second.digest
    assert second.paths[0].startswith(str(moved))


def test_names_that_would_be_the_same_get_their_folders(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, [2])
    index = open_index((Source(f"{tmp_path}/*/s000.tar"),), None, tmp_path / "run")
    assert index.names == ("cats/s000", "dogs/s000")


def test_save_and_load(folder: Path, tmp_path: Path) -> None:
    index = build_index(expand([Source(f"{folder}/*.tar")]))
    index.save(tmp_path / "elsewhere.json")
    again = ShardIndex.load(tmp_path / "elsewhere.json")
    assert (again.paths, again.names, again.sha256, again.digest) == (
        index.paths, index.names, index.sha256, index.digest,
    )  # fmt: skip
    assert np.array_equal(again.samples, index.samples)


def test_labels_where_there_are_none(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [3], labels=False)
    with pytest.raises(DataError, match=r"data.label='cls'.*jpg"):
        require_labels(index, "cls")
    require_labels(write_shards(tmp_path, [3]), "cls")


# --- many shards, many ranks ---


def many(folder: Path, count: int) -> ShardIndex:
    """An index of shards that have a size and a time, and that nobody opens."""
    folder.mkdir()
    for i in range(count):
        with open(folder / f"train-{i:06d}.tar", "wb") as file:
            file.truncate(10240)
    paths = tuple(f"{folder}/train-{i:06d}.tar" for i in range(count))
    index = ShardIndex(
        paths=paths,
        names=tuple(Path(path).stem for path in paths),
        samples=np.arange(1, count + 1),
        bytes=np.full(count, 10240),
        sha256=tuple(f"{i:064x}" if i % 3 else None for i in range(count)),
        modified=np.array([os.stat(path).st_mtime_ns for path in paths]),
    )
    index.save(folder / "index.json")
    return index


def equal(a: ShardIndex, b: ShardIndex) -> bool:
    columns = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("samples", "bytes", "modified"))
    return columns and (a.paths, a.names, a.sha256, a.digest) == (b.paths, b.names, b.sha256, b.digest)


class StatCounting(LocalFiles):
    """Local files; counts what is asked of shards, and holds nothing of it."""

    asked = read_from = 0

    def stat(self, path: str) -> FileStat:
        self.asked += path.endswith(".tar")
        return super().stat(path)

    def read(self, path: str, start: int, count: int) -> bytes:
        self.read_from += path.endswith(".tar")
        return super().read(path, start, count)


def test_a_folder_written_in_two_ways_is_one(folder: Path) -> None:
    """Its rows, one shard twice, and a row that names shards by another way."""
    (folder.parent / "link").symlink_to("shards")
    sources = (Source(f"{folder}/s000.tar"), Source(f"{folder.parent}/link/s00[12].tar"))
    index = open_index(sources, None, folder.parent / "run")
    assert index.samples.tolist() == [3, 5, 2]
    path = folder.parent / "index.json"
    replace(index, paths=tuple(f"{folder.parent}/link/{name}.tar" for name in index.names)).save(path)
    assert open_index(sources, str(path), folder.parent / "run").samples.tolist() == [3, 5, 2]
    assert opened(folder, index=str(path)).samples.tolist() == [3, 5, 2]
    with pytest.raises(DataError, match="twice"):
        open_index((*sources, Source(f"{folder}/s002.tar")), None, folder.parent / "run")


@pytest.mark.parametrize("way", ["*.tar", "train-{000000..001999}.tar", "data.index", "a link"])
def test_a_start_asks_each_shard_once_and_holds_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What makes 1e5 shards open in some three times their os.stat calls, in less than 60 MB."""
    count = 2000
    written = many(tmp_path / "shards", count)
    (tmp_path / "link").symlink_to("shards")
    folder = tmp_path / ("link" if way == "a link" else "shards")
    index_path = str(tmp_path / "shards" / "index.json") if way in ("data.index", "a link") else None
    pattern = "*.tar" if index_path else way
    resolved: list[str] = []
    realpath = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: resolved.append(path) or realpath(path))
    store = StatCounting()
    tracemalloc.start()
    try:
        index = open_index((Source(f"{folder}/{pattern}"),), index_path, tmp_path / "run", store=store)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (store.asked, store.read_from) == (count, 0)
    assert len(resolved) <= 2, "folders, not shards"
    assert peak < count * 600 + (2 << 20), "600 bytes a shard, and what is parsed at once"
    assert (index.digest, index.sha256) == (written.digest, written.sha256)


@pytest.mark.parametrize(
    "layout",
    [
        lambda content: json.dumps(content),
        lambda content: json.dumps(content, indent=2),
        lambda content: json.dumps(content).replace("}, {", "},\n{"),
        lambda content: json.dumps(dict(reversed(content.items()))),
        lambda content: (
            '{"format": "vitscale-index-1", "shards": [\n' + json.dumps(content["shards"], indent=1)[1:] + "}"
        ),
    ],
)
def test_any_layout_of_the_file_loads(tmp_path: Path, layout: Any) -> None:
    """Also where it is longer than what is read at once."""
    written = many(tmp_path / "shards", 3000)
    path = tmp_path / "shards" / "index.json"
    assert equal(ShardIndex.load(path), written)
    assert path.stat().st_size > 1 << 18
    path.write_text(layout(json.loads(path.read_text())))
    assert equal(ShardIndex.load(path), written)


def test_a_file_that_is_cut_or_damaged_is_refused(tmp_path: Path) -> None:
    many(tmp_path / "shards", 3000)
    path = tmp_path / "shards" / "index.json"
    data = path.read_bytes()
    line = data.index(b"\n", 300_000) + 1
    for bad in (data[:line], data[: line - 2], data[:-3], data[:line] + b"x" + data[line:], data + b"{}", data[:50]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="is no index"):
            ShardIndex.load(path)


def test_an_index_goes_to_other_ranks(tmp_path: Path) -> None:
    index = replace(many(tmp_path / "shards", 500), fallback_folders=("/a", "/b"))
    data, store = index.to_bytes(), CountingFiles()
    there = ShardIndex.from_bytes(data, store)
    assert equal(there, index)
    assert there.fallback_folders == ("/a", "/b")
    assert there.store is store
    assert not store.stats
    assert len(data) < 60 * 500
    for at in range(0, len(data), 97):
        with pytest.raises(DataError, match="damaged"):
            ShardIndex.from_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    odd = replace(index, paths=(*index.paths[:-1], f"{tmp_path}/odd \udcff\n.tar"))
    assert ShardIndex.from_bytes(odd.to_bytes()).paths == odd.paths


@pytest.mark.parametrize("read_only", [False, True])
def test_names_that_are_no_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str], read_only: bool) -> None:
    """Opened and kept like others; the names that go into files of text are text."""
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/100% \xfe"))
    folder.mkdir()
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x")]).rename(folder / os.fsdecode(b"a b%41 \xff.tar"))
    store = CountingFiles(read_only=str(folder) if read_only else None)
    sources = (Source(f"{tmp_path}/100*/*.tar"),)
    index = open_index(sources, None, tmp_path / "run", store=store)
    assert index.names == ("a b%41 \\udcff",)
    there = ShardIndex.from_bytes(index.to_bytes())
    assert (there.paths, there.digest) == (index.paths, index.digest)
    second = CountingFiles(read_only=store.read_only)
    assert open_index(sources, None, tmp_path / "run", store=second).table(0, "cls").key(0) == "1"
    assert not second.headers
    assert not capsys.readouterr().err


def test_labels_are_looked_for_in_the_table(folder: Path) -> None:
    store = CountingFiles()
    require_labels(replace(opened(folder), store=store), "cls")
    assert not store.headers
