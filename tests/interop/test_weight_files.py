"""Files of tensors: in one or in several, written whole, and clear about what is wrong with them."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop import weight_files
from vitscale.interop.weight_files import read_file, read_weights, write_folder

TENSORS = {name: torch.full((256,), float(place)) for place, name in enumerate("abcdef")}  # 1 KB each
INDEX = "model.safetensors.index.json"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def one_line(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_weights(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_in_one_file(tmp_path: Path) -> None:
    write_folder(tmp_path, {"config.json": "{}"}, TENSORS)
    assert names(tmp_path) == ["config.json", "model.safetensors"]
    assert_equal(read_weights(tmp_path), TENSORS)


@pytest.mark.parametrize("size", ["2KB", 2000])
def test_in_several(tmp_path: Path, size: int | str) -> None:
    write_folder(tmp_path, {}, TENSORS, size)
    shards = [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]
    assert names(tmp_path) == [*shards, INDEX]
    assert_equal(read_weights(tmp_path), TENSORS)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == dict(zip("abcdef", shards, strict=True))
    assert index["metadata"]["total_size"] == 6 * 1024


def test_a_tensor_larger_than_a_file_may_be(tmp_path: Path) -> None:
    write_folder(tmp_path, {}, TENSORS | {"big": torch.zeros(9999)}, "3KB")
    assert_equal(read_weights(tmp_path), TENSORS | {"big": torch.zeros(9999)})


@pytest.mark.parametrize("size", ["many", "5XB", -1.5])
def test_a_size_that_is_none(tmp_path: Path, size: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        write_folder(tmp_path / "out", {}, TENSORS, size)
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_save_left_goes(tmp_path: Path) -> None:
    others = {"c": torch.zeros(3)}
    (tmp_path / "optimizer.safetensors").write_bytes(b"mine")
    for tensors, size in ((TENSORS, "2KB"), (others, "1GB"), (TENSORS, "3KB"), (TENSORS, "2KB")):
        write_folder(tmp_path, {}, tensors, size)
        assert_equal(read_weights(tmp_path), tensors)
    assert sum(name.startswith("model-") for name in names(tmp_path)) == 6
    assert "model.safetensors" not in names(tmp_path)
    assert (tmp_path / "optimizer.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("size", ["1GB", "2KB"])
def test_killed_at_any_point_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """What is read afterwards is the old weights whole, the new ones with their config, or a clear error.

    Nor is there ever an index whose files are not all there.
    """
    new = {name: value + 100 for name, value in TENSORS.items()}

    class Killed(BaseException):
        pass

    def counted(call: str, deadline: int) -> None:
        real = getattr(os, call)

        def replaced(*args: object) -> None:
            nonlocal done
            done += 1
            if done > deadline:
                raise Killed
            real(*args)

        monkeypatch.setattr(os, call, replaced)

    seen = set()
    for deadline in range(20):
        monkeypatch.undo()
        folder = tmp_path / str(deadline)
        write_folder(folder, {"config.json": "old"}, TENSORS, size)
        done = 0
        counted("replace", deadline)
        with contextlib.suppress(Killed):
            write_folder(folder, {"config.json": "new"}, new, size)
        try:
            found = read_weights(folder)
            both = [all(torch.equal(found[name], each[name]) for name in each) for each in (TENSORS, new)]
            assert any(both)
            assert not both[1] or (folder / "config.json").read_text() == "new"
            seen.add("new" if both[1] else "old")
        except CheckpointError:
            assert not {"model.safetensors", INDEX} & set(names(folder))
            seen.add("error")
        if done <= deadline:
            break
    assert "new" in seen
    assert not [name for name in names(folder) if name.startswith(".")]


def test_a_full_disk_leaves_no_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        write_folder(tmp_path, {"config.json": "{}"}, TENSORS)
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_folder(tmp_path / "file", {}, TENSORS)


def test_cut_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_folder(tmp_path, {}, TENSORS)
    whole = path.read_bytes()
    cut = {whole[:-10]: "cannot be read as safetensors: ", whole[:100]: "cannot be read as safetensors: "}
    for content, what in (cut | dict.fromkeys((whole[:4], b"", b"\0" * 64), "holds no weights, ")).items():
        path.write_bytes(content)
        said = one_line(tmp_path)
        assert f"{path}: {what}" in said
        assert said.endswith("it is cut or damaged: fetch it again")
    path.unlink()
    assert f"{path}: no such file" in one_line(tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", ["weights.ckpt", "weights.safetensors", "weights.SAFETENSORS", "weights"])
def test_the_content_tells_what_a_file_is_not_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(TENSORS, path)
    assert_equal(read_file(path), TENSORS)
    for zipped in (True, False):
        torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
        assert_equal(read_file(path), TENSORS)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script")
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with tarfile.open(tmp_path / "archive", "w") as archive:
        archive.add(path, "weights")
    with zipfile.ZipFile(zipped_up := io.BytesIO(), "w") as archived:
        archived.write(path, "best.pth")
    for content, what in (
        ((tmp_path / "script").read_bytes(), "is TorchScript"),
        ((tmp_path / "arrays.npz").read_bytes(), "is NumPy's archive"),
        ((tmp_path / "archive").read_bytes(), "is a tar archive: unpack it"),
        (gzip.compress(path.read_bytes()), "is compressed: unpack it by gunzip"),
        (bz2.compress(path.read_bytes()), "is compressed: unpack it by bunzip2"),
        (lzma.compress(path.read_bytes()), "is compressed: unpack it by unxz"),
        (zipped_up.getvalue(), "is an archive of files"),
        (b"\n\n<!DOCTYPE html><title>Sign in</title>", "is a web page"),
        (b' {"model_type": "vit"}', "is JSON: name the folder"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n", "is a git-lfs pointer: `git"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: holds no weights, it {what}"):
            read_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_late_pickle_is_told_from_a_cut_one(tmp_path: Path, zipped: bool) -> None:
    torch.save(TENSORS, tmp_path / "a.pth", pickle_protocol=5, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"is a pickle of protocol 4 or later.*torch.save\(torch.load"):
        read_file(tmp_path / "a.pth")


def test_missing_and_other_shards(tmp_path: Path) -> None:
    write_folder(tmp_path, {}, TENSORS, "2KB")
    index, shard = tmp_path / INDEX, tmp_path / "model-00002-of-00006.safetensors"
    held = load_file(shard)
    save_file(held | {"extra": torch.zeros(1)}, shard)
    assert f"{shard}: holds other tensors than {INDEX} says" in one_line(tmp_path)
    shard.unlink()
    assert f"{shard}: no such file, and {INDEX} names it" in one_line(tmp_path)
    good = json.loads(index.read_text())
    for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\b.safetensors", "weights.bin"):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {"a": name}}))
        assert "must name *.safetensors files that lie beside it" in one_line(tmp_path)
    for content in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": [1]}'):
        index.write_text(content)
        assert str(index) in one_line(tmp_path)


def test_pytorchs_pickle(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    assert_equal(read_weights(tmp_path), TENSORS)
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:100], b"", b"no pickle", b"hello, world", b"\x80\x02hello", b"\x8a" * 9):
        path.write_bytes(content)
        said = one_line(tmp_path)
        assert f"{path}: " in said
        assert len(said) < len(str(path)) + 200, "the first sentence of torch's paragraph"
        assert said.endswith("it is cut or damaged: fetch it again")
    torch.save([TENSORS], path)
    assert "must hold tensors by name, and holds list" in one_line(tmp_path)
    path.unlink()
    halves = {"one.bin": {"a": TENSORS["a"]}, "two.bin": {"b": TENSORS["b"]}}
    for name, part in halves.items():
        torch.save(part, tmp_path / name)
    placed = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(placed))
    assert_equal(read_weights(tmp_path), {name: TENSORS[name] for name in "ab"})


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {os.environ['EVIL']}",)


def test_a_pickle_that_would_run_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    torch.save(TENSORS | {"z": Evil()}, tmp_path / "pytorch_model.bin")
    said = one_line(tmp_path)
    assert "asks for posix.system, which could run anything; get these weights as safetensors" in said
    assert not (tmp_path / "ran").exists()


def test_safetensors_go_before_a_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    write_folder(tmp_path, {}, TENSORS)
    assert_equal(read_weights(tmp_path), TENSORS)
    assert (tmp_path / "pytorch_model.bin").exists()
