"""The shell around it: set-up once, from any folder, with one clear line where something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.sh"), ROOT / ".ci" / "run"])
HIDDEN = ("VITSCALE_", "SLURM_", "NPROC_PER_NODE", "NNODES", "RDZV_", "RANK", "PYTHON")

# A stand-in for Python on a machine where pip needs no network: it logs what it is asked for.
FAKE_PYTHON = """\
#!/bin/bash
echo "$@" >>{log}
case "$*" in
    "-m venv"*) rm -rf "${{@: -1}}" && mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
    "-m pip"*) {pip} ;;
    "-c import sys"*) {version} ;;
    *) exit 0 ;;
esac
"""


def run(
    command: list[str], cwd: Path = ROOT, path: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
    given = {**inherited, "PATH": path or inherited["PATH"], **environment}
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, timeout=300)


def sourced(code: str, **options: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell after launch/environment.sh."""
    return run(["bash", "-c", f'set -eu; . "{ROOT}/launch/environment.sh"; {code}'], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    assert run(["bash", "-n", str(script)]).returncode == 0
    assert script.name == "environment.sh" or os.access(script, os.X_OK)


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """fake(pip, version) -> (a PATH with such a python3, the log of what it was asked for)."""

    def make(pip: str = "exit 0", version: str = "exit 0") -> tuple[str, Path]:
        folder, log = tmp_path / "bin", tmp_path / "asked.log"
        folder.mkdir()
        for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
            (folder / name).write_text(FAKE_PYTHON.format(log=log, pip=pip, version=version))
            (folder / name).chmod(0o755)
        return f"{folder}:/usr/bin:/bin", log

    return make


def test_set_up_happens_once(fake: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    path, log = fake()
    options = {"path": path, "VITSCALE_VENV": str(tmp_path / "venv")}
    assert sourced("set_up run", **options).returncode == 0
    installs = [line for line in log.read_text().splitlines() if line.startswith("-m pip install")]
    assert len(installs) == 1
    assert f"--editable {ROOT}" in installs[0]
    assert "[dev]" not in installs[0]
    log.unlink()
    again = sourced("set_up run; echo $PYTHON", **options)
    assert again.stdout == f"{tmp_path}/venv/bin/python\n"
    assert "pip" not in log.read_text()


def test_the_development_set_up_serves_both(fake: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    path, log = fake()
    options = {"path": path, "VITSCALE_VENV": str(tmp_path / "venv")}
    assert sourced("set_up dev", **options).returncode == 0
    installs = [line for line in log.read_text().splitlines() if line.startswith("-m pip install")]
    assert any("[dev]" in line for line in installs)
    assert any("torchvision" in line for line in installs)
    log.unlink()
    assert sourced("set_up run", **options).returncode == 0
    assert "pip" not in log.read_text()


def test_another_checkout_or_constraint_is_installed_anew(
    fake: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    path, log = fake()
    options = {"path": path, "VITSCALE_VENV": str(tmp_path / "venv")}
    assert sourced("set_up run", **options).returncode == 0
    stamp = tmp_path / "venv" / "installed-run"
    stamp.write_text(stamp.read_text().replace(str(ROOT), "/elsewhere"))
    log.unlink()
    assert sourced("set_up run", **options).returncode == 0
    assert "-m pip install" in log.read_text()


def test_a_failed_install_names_the_log(fake: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    path, _ = fake(pip="echo 'ERROR: no such thing'; exit 1")
    done = sourced("set_up run", path=path, VITSCALE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "ERROR: no such thing" in done.stderr
    assert f"{tmp_path}/venv/setup.log" in done.stderr
    assert not list((tmp_path / "venv").glob("installed-*"))


def test_an_old_python_is_said(fake: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    path, _ = fake(version="exit 1")
    done = sourced("set_up run", path=path, VITSCALE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_venv_module_is_said(fake: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    path, _ = fake(version='exit 0 ;; "-c import ensurepip"*) exit 1')
    done = sourced("set_up run", path=path, VITSCALE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr


def test_a_folder_of_other_things_is_left_alone(fake: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    path, _ = fake()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    done = sourced("set_up run", path=path, VITSCALE_VENV=str(tmp_path / "mine"))
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_broken_environment_is_made_anew(fake: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    path, log = fake()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    (tmp_path / "venv" / "bin" / "python").symlink_to("/nowhere")
    assert sourced("set_up run", path=path, VITSCALE_VENV=str(tmp_path / "venv")).returncode == 0
    assert f"-m venv --clear {tmp_path}/venv" in log.read_text()


def test_a_relative_environment_is_the_callers(tmp_path: Path) -> None:
    done = run(
        ["bash", "-c", f'. "{ROOT}/launch/environment.sh"; cd /; echo "$VENV $VITSCALE_VENV $ROOT"'],
        cwd=tmp_path,
        VITSCALE_VENV="mine",
    )
    assert done.stdout.split() == [f"{tmp_path}/mine", f"{tmp_path}/mine", str(ROOT)]


def test_without_an_environment_the_paths_python_must_do(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.symlink_to("/bin/false")
    options = {"path": f"{tmp_path}/bin:/usr/bin:/bin", "VITSCALE_VENV": str(tmp_path / "venv")}
    done = sourced("use_python", **options)
    assert done.returncode == 1
    assert f"{python} has no torch" in done.stderr
    python.unlink()
    python.symlink_to("/bin/true")
    assert sourced("use_python; echo $PYTHON", **options).stdout == f"{python}\n"


def test_torchrun_from_any_folder(tmp_path: Path, venv: str) -> None:
    done = run([str(ROOT / "launch" / "torchrun.sh"), "pretrain", "missing.yaml"], cwd=tmp_path, VITSCALE_VENV=venv)
    assert done.returncode == 2
    assert done.stderr.startswith("launch/torchrun.sh: error: missing.yaml: no such config file")
    assert len(done.stderr.splitlines()) == 1


def test_a_config_error_starts_no_process(tmp_path: Path, venv: str) -> None:
    (tmp_path / "c.yaml").write_text("train: {steps: 1, global_batch: 9, micro_batch: 1}\n")
    command = [str(ROOT / "launch" / "torchrun.sh"), "pretrain", "c.yaml"]
    done = run(command, cwd=tmp_path, VITSCALE_VENV=venv, NPROC_PER_NODE="2")
    assert done.returncode == 2
    assert "train.global_batch=9" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_batch_script_says_where_it_must_be_submitted(tmp_path: Path) -> None:
    """Slurm runs a copy of the script in its spool folder."""
    copy = tmp_path / "slurm_script"
    shutil.copy(ROOT / "slurm" / "pretrain_vit_h.sh", copy)
    done = run(["bash", str(copy)], cwd=tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "VITSCALE_HOME" in done.stderr


def test_a_batch_script_passes_config_data_and_overrides(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "launch").mkdir(parents=True)
    (home / "launch" / "slurm.sh").write_text('printf "%s\\n" "$@"\n')
    script = str(ROOT / "slurm" / "pretrain_vit_h.sh")
    plain = run(["bash", script], SLURM_SUBMIT_DIR=str(home))
    assert plain.stdout.splitlines() == ["pretrain", f"{home}/configs/pretrain_vit_h_mae.yaml"]
    asked = {"VITSCALE_HOME": str(home), "CONFIG": "c.yaml", "DATA": "/o'x/{0..9}.tar"}
    given = run(["bash", script, "run.name=a b"], SLURM_SUBMIT_DIR="/", **asked)
    assert given.stdout.splitlines() == ["pretrain", "c.yaml", "data.train=/o'x/{0..9}.tar", "run.name=a b"]


def test_the_sites_file_must_be_there(venv: str) -> None:
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), "pretrain", "c.yaml"]
    done = run(command, VITSCALE_VENV=venv, VITSCALE_SITE_ENV="/nowhere")
    assert done.returncode == 1
    assert "VITSCALE_SITE_ENV=/nowhere" in done.stderr
