"""What is kept of a start."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vitscale import __version__
from vitscale.launch import snapshot
from vitscale.run_folder import RunFolder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {n: v for n, v in os.environ.items() if not n.startswith("SLURM")})


def test_command_and_configs_as_given(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text("# base\n")
    (tmp_path / "configs" / "middle.yaml").write_text("extends: base.yaml  # middle\n")
    given = tmp_path / "mine.yaml"
    given.write_text("extends: configs/middle.yaml  # mine\n")
    os.environ["NPROC_PER_NODE"] = "2"
    kept = snapshot.keep_snapshot(RunFolder(tmp_path / "run"), given, ["launch/torchrun.sh", "pretrain", "a b=c"])
    assert kept.parent == tmp_path / "run" / "launch"
    lines = (kept / "command.txt").read_text().splitlines()
    assert lines[0] == "launch/torchrun.sh pretrain 'a b=c'"
    assert "NPROC_PER_NODE=2" in lines
    files = {path.name: path.read_text() for path in kept.iterdir()}
    assert files["config.yaml"] == given.read_text()
    assert "middle" in files["config.extends-1.yaml"]
    assert files["config.extends-2.yaml"] == "# base\n"
    assert "slurm.sh" not in files
    assert files["code.txt"].startswith(f"vitscale {__version__}, ")


def _git(folder: Path, *arguments: str) -> str:
    named = ("git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t")
    return subprocess.run((*named, *arguments), check=True, capture_output=True, text=True).stdout.strip()


def test_code_version_tells_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "__file__", str(tmp_path / "vitscale" / "launch" / "snapshot.py"))
    assert snapshot.code_version() == f"vitscale {__version__}, not in a git checkout\n"
    _git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("1\n")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "one")
    assert _git(tmp_path, "rev-parse", "HEAD") in snapshot.code_version()
    assert "no change since" in snapshot.code_version()
    (tmp_path / "a.txt").write_text("1\n2\n")
    (tmp_path / "new.txt").touch()
    said = snapshot.code_version()
    assert "1 insertion" in said
    assert "?? new.txt" in said


def test_a_machine_without_git_starts_all_the_same(tmp_path: Path) -> None:
    os.environ["PATH"] = str(tmp_path)
    assert snapshot.code_version().endswith("not in a git checkout\n")
