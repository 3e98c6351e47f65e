from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.makers import photo
from vitscale.data.index import ShardIndex
from vitscale.errors import DataError
from vitscale.files.classes import class_names
from vitscale.files.tar import scan_shard
from vitscale.prepare.digits import write_digits
from vitscale.prepare.pack import pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 12 images, with names that tar shards have trouble with."""
    root = tmp_path / "images"
    for number in range(36):
        name = f"img.{number:04d}.JPG" if number % 3 else f"deep/__{number}__.jpeg"
        path = root / ("ant", "bee", "cow")[number % 3] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    (root / "ant" / "notes.txt").write_text("no image")
    (root / "ant" / ".hidden.jpg").write_bytes(b"")
    return root


def contents(paths: tuple[str, ...]) -> dict[str, dict[str, bytes]]:
    """key -> {extension: bytes} over shards, by our own table."""
    samples = {}
    for path in paths:
        data, table = Path(path).read_bytes(), scan_shard(path)
        for i, key in enumerate(table.keys):
            samples[key] = {kind: data[at : at + size] for kind, (at, size) in table.members(i).items()}
    return samples


def test_webdataset_reads_what_we_pack(folder: Path, tmp_path: Path) -> None:
    import webdataset

    index = pack(folder, tmp_path / "out", shard_samples=10)[""]
    assert index.samples.tolist() == [10, 10, 10, 6]
    theirs = {}
    for sample in webdataset.WebDataset(list(index.paths), shardshuffle=False, nodesplitter=None):
        theirs[sample["__key__"]] = {kind: data for kind, data in sample.items() if not kind.startswith("__")}
    assert theirs == contents(index.paths)
    packed = {sample["cls"] + (sample.get("jpg") or sample["jpeg"]) for sample in theirs.values()}
    assert packed == {str(number % 3).encode() + photo(number) for number in range(36)}, "bytes as they were"
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "bee", "cow"]


def test_it_says_which_key_the_classes_need(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    pack(folder, tmp_path / "out", held_out=0.3, workers=1, report=said.append)
    assert [Path(line.split(":")[0]).name for line in said] == ["images", "train", "test", "classes.json"]
    assert said[0].endswith("left out: 2 files that are no images (1 hidden, 1 .txt)")
    assert "3 classes" in said[-1]
    assert said[-1].endswith("model.num_labels=3")
    said.clear()
    pack(folder / "bee", tmp_path / "flat", workers=1, report=said.append)
    assert len(said) == 1, "without labels there is no key to set"


def test_keys_tell_the_file(folder: Path, tmp_path: Path) -> None:
    keys = set(contents(pack(folder, tmp_path / "out")[""].paths))
    assert {"bee/img_0001", "ant/deep/__0__", "cow/img_0002"} <= keys


def test_the_same_folder_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    digests = []
    for name, workers in (("a", 1), ("b", 3)):
        index = pack(folder, tmp_path / name, shard_samples=7, workers=workers)[""]
        for path, digest in zip(index.paths, index.sha256, strict=True):
            assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
        digests.append((index.sha256, index.digest))
    assert digests[0] == digests[1]
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}


def test_classes_mix_and_the_seed_shuffles(folder: Path, tmp_path: Path) -> None:
    orders = [list(contents(pack(folder, tmp_path / str(seed), seed=seed)[""].paths)) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert len({key.split("/")[0] for key in orders[0][:12]}) == 3


def test_held_out_images_stay_held_out(folder: Path, tmp_path: Path) -> None:
    before = pack(folder, tmp_path / "a", held_out=0.3)
    assert before["train"].total + before["test"].total == 36
    assert 4 <= before["test"].total <= 18
    for number in range(100, 130):
        (folder / "ant" / f"{number}.jpg").write_bytes(photo(number))
    after = pack(folder, tmp_path / "b", held_out=0.3)
    assert set(contents(before["test"].paths)) <= set(contents(after["test"].paths))
    assert set(contents(before["train"].paths)) <= set(contents(after["train"].paths))
    assert not set(contents(after["train"].paths)) & set(contents(after["test"].paths))


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for name in ("a.jpg", "a.png", "a.b.jpg", "a_b.jpg"):
        (tmp_path / "flat" / name).write_bytes(name.encode())
    index = pack(tmp_path / "flat", tmp_path / "out", shard_bytes=10)[""]
    assert contents(index.paths) == {
        "a": {"jpg": b"a.jpg"}, "a~2": {"png": b"a.png"}, "a_b": {"jpg": b"a.b.jpg"}, "a_b~2": {"jpg": b"a_b.jpg"},
    }  # fmt: skip
    assert len(index.paths) == 4
    assert not (tmp_path / "out" / "classes.json").exists()
    with pytest.raises(DataError, match="leave --classes out"):
        pack(tmp_path / "flat", tmp_path / "other", classes=["ant"])


def test_classes_of_other_shards(folder: Path, tmp_path: Path) -> None:
    """A folder that lacks a class has the labels of the one that has it."""
    names = sorted(entry.name for entry in folder.iterdir())
    index = pack(folder, tmp_path / "out", classes=["aardvark", *names])[""]
    labels = {key.split("/")[0]: int(members["cls"]) for key, members in contents(index.paths).items()}
    assert labels == {name: place for place, name in enumerate(names, start=1)}
    assert class_names(index.paths) == ["aardvark", *names]
    with pytest.raises(DataError, match=f"{names[1]}: is none of the classes {names[0]}"):
        pack(folder, tmp_path / "other", classes=names[:1])


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, out, options, word in (
        (folder, tmp_path / "full", {}, "not an empty folder"),
        (tmp_path / "nowhere", tmp_path / "x", {}, "no such folder or file"),
        (tmp_path / "empty", tmp_path / "x", {}, "holds no images"),
        (folder, tmp_path / "x", {"held_out": 1.5}, "held_out=1.5"),
        (folder, tmp_path / "x", {"held_out": 1e-9}, "none falls into test"),
        (folder, tmp_path / "x", {"shard_samples": 0}, "shard_samples=0"),
    ):
        with pytest.raises(DataError, match=word):
            pack(source, out, **options)
    (folder / "loose.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="beside folders"):
        pack(folder, tmp_path / "x")
    (folder / "loose.jpg").unlink()
    (folder / "dodo").mkdir()
    with pytest.raises(DataError, match=r"dodo.*without images"):
        pack(folder, tmp_path / "x")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]


def test_digits(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    assert write_digits(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not write_digits(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    train, test = (ShardIndex.load(out / split / "index.json") for split in ("train", "test"))
    assert (train.total, test.total) == (1437, 360)
    samples = contents(train.paths) | contents(test.paths)
    assert len(samples) == 1797
    from sklearn.datasets import load_digits

    from tests.files.test_decode import decode

    digits = load_digits()
    for key in ("0000", "0777", "1796"):
        pixels, _ = decode(samples[key]["png"], channels=1)
        assert np.array_equal(pixels[..., 0], np.rint(digits.images[int(key)] * 255 / 16))
        assert int(samples[key]["cls"]) == digits.target[int(key)]
    assert len(set(digits.target[[int(key) for key in contents(test.paths)]])) == 10
    (out / "train" / "train-000003.tar").write_bytes(b"cut")
    with pytest.raises(DataError, match="not an empty folder"):
        write_digits(out)


def test_digits_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitscale.prepare.digits"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    ended = subprocess.run([*command, str(tmp_path / "full")], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("vitscale: error: ")
