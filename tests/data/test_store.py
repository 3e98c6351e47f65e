from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from vitscale.files.store import FileStat, LocalFiles


def test_a_file_is_listed_measured_and_read_in_ranges(tmp_path: Path) -> None:
    path = tmp_path / "b.tar"
    path.write_bytes(bytes(range(200)))
    os.utime(path, ns=(5, 7_000_000_123))
    store = LocalFiles()
    assert store.stat(str(path)) == FileStat(200, 7_000_000_123)
    assert store.read(str(path), 10, 3) == bytes([10, 11, 12])
    assert store.read(str(path), 195, 50) == bytes(range(195, 200)), "fewer at the file's end"
    assert store.read(str(path), 300, 1) == b""


@pytest.mark.parametrize(
    "pattern",
    ["*.tar", "?.tar", "[a-b].tar", "*", ".*", "c/*.tar", "*/*.tar", "**/*.tar", "**", "none*", "d/*", "*/d.tar",
     "[c]/.*", "*/none/*", "*/../c/*", "[[]x]/[[]1].tar"],
)  # fmt: skip
def test_patterns_are_globs(tmp_path: Path, pattern: str) -> None:
    import glob

    for name in ("b.tar", "a.tar", ".hidden.tar", "a.txt", "c/d.tar", "c/e.tar", "c/.f.tar", "[x]/[1].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert LocalFiles().list(f"{tmp_path}/{pattern}") == sorted(glob.glob(f"{tmp_path}/{pattern}"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    store, path = LocalFiles(), str(tmp_path / "none.tar")
    for ask in (lambda: store.stat(path), lambda: store.read(path, 0, 1)):
        with pytest.raises(FileNotFoundError) as caught:
            ask()
        assert caught.value.filename == path


def test_write_replaces_whole_files_and_makes_their_folder(tmp_path: Path) -> None:
    store, path = LocalFiles(), tmp_path / "new" / "a"
    for content in (b"first", b"second, longer"):
        store.write(str(path), content)
        assert store.read(str(path), 0, 100) == content, "also where an older one was open"
    assert os.listdir(path.parent) == ["a"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        store.write(str(tmp_path / "file" / "a"), b"")


def test_after_a_stat_the_file_in_its_place_is_read(tmp_path: Path) -> None:
    store, path = LocalFiles(), tmp_path / "a"
    path.write_bytes(b"old")
    assert store.read(str(path), 0, 9) == b"old"
    (tmp_path / "b").write_bytes(b"newer")
    os.replace(tmp_path / "b", path)
    assert store.stat(str(path)).bytes == 5
    assert store.read(str(path), 0, 9) == b"newer"


def test_open_files_are_few_and_do_not_travel(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i}").write_bytes(bytes([i % 256]))
    store = LocalFiles()
    assert [store.read(f"{tmp_path}/{i}", 0, 1)[0] for i in range(300)] == [i % 256 for i in range(300)]
    assert _open_in(tmp_path) == 256
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read(f"{tmp_path}/7", 0, 1) == b"\x07"
    del store, copy
    assert _open_in(tmp_path) == 0


def _open_in(folder: Path) -> int:
    """How many files of a folder this process has open."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).startswith(f"{folder}/") for link in links)
