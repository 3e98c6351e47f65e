"""What a user can do wrong: one clear line and exit code 2, on however many ranks."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.integration.test_surroundings import KUBEFLOW
from tests.integration.worlds import Launcher, losses, rows
from vitscale.run_folder import BAD_INPUT


def _refused(launcher: Launcher, argv: list[str], ranks: int = 1) -> str:
    """The one line that tells the error."""
    output = launcher.run(argv, ranks, code=BAD_INPUT)
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("vitscale: error:")]
    assert len(lines) == 1, output
    return lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.steps=3", ["trian", "train"]),
        ("train.steps=many", ["train.steps", "'many'", "whole number"]),
        ("train.global_batch=18", ["train.global_batch=18", "train.micro_batch=4"]),
        ("data.train=/nowhere/*.tar", ["/nowhere/*.tar"]),
        ("data.train=pipe:cat /etc/hostname", ["pipe:"]),
        ("model.patch_size=5", ["model.image_size=16", "model.patch_size=5"]),
        ("model.hidden_dropout_prob=0.1", ["hidden_dropout_prob", "drop_path_rate"]),
    ],
)
def test_config(launcher: Launcher, config: Path, override: str, words: list[str]) -> None:
    line = _refused(launcher, ["pretrain", str(config), override], ranks=2 if "batch" in override else 1)
    for word in words:
        assert word in line


def _shard(path: Path, samples: int, label: bool = True, bad: int = 0) -> None:
    """A tar of PNG samples, `bad` of which, evenly spread, are text files called .jpg."""
    from PIL import Image

    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            buffer = io.BytesIO()
            Image.new("RGB", (20, 20), (number, 50, 100)).save(buffer, "PNG")
            members = {"jpg": b"not an image"} if number * bad % samples < bad else {"png": buffer.getvalue()}
            if label:
                members["cls"] = b"1"
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_empty_tar(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    _shard(tmp_path / "empty.tar", 0)
    assert "empty.tar" in _refused(launcher, ["pretrain", str(config), f"data.train={tmp_path}/empty.tar"])


def test_cut_tar(launcher: Launcher, config: Path, shards: Path, tmp_path: Path) -> None:
    whole = sorted(shards.glob("*.tar"))[0]
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "cut.tar" in _refused(launcher, ["pretrain", str(config), f"data.train={tmp_path}/cut.tar"])


def test_shard_cut_after_it_was_indexed(launcher: Launcher, config: Path, shards: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(shards, copied)
    argv = ["pretrain", str(config), f"data.train={copied}/*.tar", f"data.index={copied}/index.json"]
    first = sorted(copied.glob("*.tar"))[1]
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    world = launcher.start(argv, 2)
    codes = world.wait()
    assert BAD_INPUT in codes
    assert all(codes), codes
    assert first.name in world.output()


def test_few_bad_samples_are_replaced_and_counted(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    _shard(tmp_path / "some.tar", 64, bad=8)
    argv = ["pretrain", str(config), f"data.train={tmp_path}/some.tar", "train.steps=3", "data.max_bad_fraction=0.5"]
    launcher.run(argv, 2)
    run = tmp_path / "runs" / "run"
    quarantine = rows(run, "quarantine.jsonl")
    assert {int(row["key"]) % 8 for row in quarantine} == {0}
    assert quarantine
    assert {"step", "shard", "key", "cause", "reason"} <= quarantine[0].keys()
    assert rows(run)[-1]["bad_samples"] == len(quarantine)
    assert len(losses(run)) == 3


def test_too_many_bad_samples_stop_all_ranks(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    _shard(tmp_path / "bad.tar", 64, bad=32)
    line = _refused(launcher, ["pretrain", str(config), f"data.train={tmp_path}/bad.tar"], ranks=2)
    assert "data.max_bad_fraction" in line


@pytest.mark.parametrize("objective", ["classification", "multitask"])
def test_labels_missing(launcher: Launcher, config: Path, tmp_path: Path, objective: str) -> None:
    _shard(tmp_path / "unlabelled.tar", 64, label=False)
    argv = ["pretrain", str(config), f"data.train={tmp_path}/unlabelled.tar", f"objective.name={objective}"]
    assert "cls" in _refused(launcher, argv)


def test_second_run_in_one_folder(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    from vitscale.run_folder import RunFolder

    folder = RunFolder(tmp_path / "runs" / "run")
    with folder.locked():
        assert "is in use by process" in _refused(launcher, ["pretrain", str(config)])
    assert folder.read_exit() is None
    launcher.run(["pretrain", str(config), "train.steps=2"])


def test_ranks_that_see_different_folders(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """Two nodes with one config and one relative run.dir, which is not on a file system that they share."""
    nodes = [tmp_path / f"node{rank}" for rank in range(2)]
    for node in nodes:
        node.mkdir()
    argv = ["pretrain", str(config), "run.dir=runs"]
    world = launcher.request(2, argv=argv, environment=KUBEFLOW, folders=[str(node) for node in nodes])
    assert world.wait() == [BAD_INPUT, BAD_INPUT], world.output()
    for rank in range(2):
        said = Path(f"{world.log}.{rank}").read_text()
        assert "another run folder (held by nobody)" in said or "on one shared folder" in said, said


def test_too_few_samples(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    _shard(tmp_path / "few.tar", 10)
    line = _refused(launcher, ["pretrain", str(config), f"data.train={tmp_path}/few.tar"])
    assert "10" in line
    assert "train.global_batch" in line
