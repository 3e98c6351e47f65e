"""The GPU suite and its wheels from the command line; rehearsed as a whole on a CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_scripts import ROOT, run

SUITE, WHEELS = ROOT / "launch" / "gpu_suite.sh", ROOT / "launch" / "gpu_wheels.sh"

# Python on a machine with a GPU (where `sees`), or one that pip gives wheels of `size` bytes.
FAKE_PYTHON = """\
#!/bin/bash
echo "$@" >>{folder}/asked
case "$*" in
    "-c import sys, torch"*) exit {sees} ;;
    "-m pip install"*) {install} ;;
    "-m pip download"*) truncate -s {size} "$5/downloaded-1-py3-none-any.whl" ;;
    "-m pip wheel"*) truncate -s 1000 "$5/built-1-py3-none-any.whl" ;;
    "-m vitscale"*) echo "PYTHONPATH=$PYTHONPATH" ;;
esac
"""
INSTALL = 'while [ "$1" != --target ]; do shift; done; mkdir -p "$2"'


def fake_python(folder: Path, name: str = "python3", sees: int = 0, size: int = 0, install: str = INSTALL) -> str:
    """A PATH that begins with `folder`, where it is; what it is asked for is in folder/asked."""
    folder.mkdir(parents=True)
    (folder / name).write_text(FAKE_PYTHON.format(folder=folder, sees=sees, size=size, install=install))
    (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def asked(folder: Path, start: str) -> list[str]:
    return [line for line in (folder / "asked").read_text().splitlines() if line.startswith(start)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without .git."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("vitscale", "launch", "configs", "tests/gpu", "tests/integration", "tests/data"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [ROOT / "pyproject.toml", *(ROOT / "tests").glob("*.py")]:
        shutil.copy(path, copy / path.relative_to(ROOT))
    return copy


def test_the_rehearsal_passes_and_leaves_what_is_said(tree: Path, venv: str, tmp_path: Path) -> None:
    def rehearse() -> subprocess.CompletedProcess[str]:
        command = ["bash", str(tree / "launch" / "gpu_suite.sh"), "out/new"]
        return run(command, cwd=tmp_path, DEVICE="cpu", VITSCALE_VENV=venv, TMPDIR=str(tmp_path / "scratch"))

    (tmp_path / "scratch").mkdir()
    done = rehearse()
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out" / "new"
    content = (out / "results.json").read_text()
    stages = json.loads(content)["stages"]
    states = {letter: {case["state"] for case in stage["cases"].values()} for letter, stage in stages.items()}
    some, none = {letter: {"passed", "cannot"} for letter in "abc"}, {"h": {"cannot"}}
    not_run = {"i": set()}  # it needs CIFAR10
    assert states == {letter: {"passed"} for letter in "defgjk"} | some | none | not_run
    assert list(stages["c"]["cases"])[:4] == ["ZeRO-0", "ZeRO-2", "ZeRO-1", "ZeRO-3"]
    figures = stages["c"]["cases"]["ZeRO-2"]["figures"]
    assert figures["images_per_second"] > 0
    assert {"data_share", "utilization", "peak_memory_gib", "losses"} <= figures.keys()
    assert stages["c"]["cases"]["ZeRO-3"]["figures"]["agrees_with"] == ["ZeRO-0", "ZeRO-2", "ZeRO-1"]
    assert (out / "summary.txt").read_text() in done.stdout
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert set(sizes) == {"results.json", "summary.txt", "log.txt", "trace-zero0.json.gz", "trace-zero2.json.gz"}
    assert max(sizes.values()) < 16 << 20
    assert list((tmp_path / "scratch").glob("vitscale-*")) == []
    assert rehearse().returncode == 0
    assert (out / "results.json").read_text() == content, "all was done"


@pytest.mark.full
def test_few_labels_are_rehearsed_on_any_labelled_shards(venv: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "vitscale.prepare.digits", str(tmp_path / "digits")], check=True, cwd=ROOT)
    settings = {"DEVICE": "cpu", "STAGES": "i", "CIFAR10": "digits", "VITSCALE_VENV": venv}
    done = run(["bash", str(SUITE), "out"], cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads((tmp_path / "out" / "results.json").read_text())["stages"]["i"]["cases"]
    assert {name: case["state"] for name, case in cases.items()} == dict.fromkeys(
        ("pretrain", "scratch, 10% of the labels", "pretrained, 10% of the labels"), "passed"
    )


@pytest.mark.parametrize(("arguments", "environment", "message"), [
    ([], {}, "needs one argument, the folder of the results"),
    (["out"], {"DEVICE": "tpu"}, "DEVICE=tpu: must be cuda or cpu"),
    (["out"], {"DEVICE": "cpu", "BUDGET_S": "abc"}, "BUDGET_S=abc: must be a whole number of seconds, 1 to"),
    (["out"], {"DEVICE": "cpu", "BUDGET_S": "12.5"}, "BUDGET_S=12.5: must be a whole number of seconds, 1 to"),
    (["out"], {"DEVICE": "cpu", "BUDGET_S": "010"}, "leave it out for 480"),
    (["out"], {"DEVICE": "cpu", "STAGES": "a,x"}, "STAGES='a,x': must be of a,b,c,d,e,f,g,h,j,k, with commas"),
    (["out"], {"DEVICE": "cpu", "STAGES": "i"}, "with commas; i needs CIFAR10=FOLDER with its shards"),
])  # fmt: skip
def test_a_wrong_call_is_told_in_a_line(
    arguments: list[str], environment: dict[str, str], message: str, venv: str, tmp_path: Path
) -> None:
    done = run(["bash", str(SUITE), *arguments], cwd=tmp_path, VITSCALE_VENV=venv, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.glob("out*")) == []


def test_without_a_gpu_the_way_to_rehearse_is_told(tmp_path: Path) -> None:
    path = fake_python(tmp_path / "bin", sees=1)
    done = run(["bash", str(SUITE), "out"], cwd=tmp_path, path=path, VITSCALE_VENV=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "no Python here has a torch that sees a GPU; DEVICE=cpu rehearses without one" in done.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="for machines without a GPU")
def test_runs_that_would_take_the_cpu_are_no_gpu_suite(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitscale.bench.gpu_suite", str(tmp_path / "out"), "--device=cuda", "--budget=9"]
    done = run(command)
    assert done.returncode == 2
    assert "DEVICE=cuda: runs would take the CPU" in done.stderr


def test_a_gpu_machines_own_python_gets_the_wheels(tmp_path: Path) -> None:
    """Into a folder that is used again, before everything else that it has."""
    path, wheels = fake_python(tmp_path / "bin"), tmp_path / "wheels"
    wheels.mkdir()
    for name in ("one-1-py3-none-any.whl", "two-1-py3-none-any.whl"):
        (wheels / name).touch()
    environment = {"WHEELS": str(wheels), "TMPDIR": str(tmp_path), "STAGES": "a", "BUDGET_S": "100",
                   "VITSCALE_VENV": str(tmp_path / "none")}  # fmt: skip
    for _ in range(2):
        done = run(["bash", str(SUITE), "out"], cwd=tmp_path, path=path, **environment)
        assert done.returncode == 0, done.stderr
    (target,) = tmp_path.glob("vitscale-wheels-*")
    assert done.stdout == f"PYTHONPATH={target}:{ROOT}\n"
    (install,) = asked(tmp_path / "bin", "-m pip install")
    assert "--no-index --no-deps --target" in install
    assert install.endswith(f"{wheels}/one-1-py3-none-any.whl {wheels}/two-1-py3-none-any.whl")
    suite = asked(tmp_path / "bin", "-m vitscale.bench.gpu_suite")
    assert suite[0].startswith(f"-m vitscale.bench.gpu_suite {tmp_path}/out --device cuda --stages a --budget ")
    assert 90 <= int(suite[0].split()[-1]) <= 100


def test_a_folder_without_wheels_is_told(tmp_path: Path) -> None:
    options = {"WHEELS": str(tmp_path / "typo"), "VITSCALE_VENV": str(tmp_path / "none")}
    done = run(["bash", str(SUITE), "out"], cwd=tmp_path, path=fake_python(tmp_path / "bin"), **options)
    assert done.returncode == 2
    assert "holds no wheels" in done.stderr


@pytest.mark.parametrize("named", [False, True])
def test_wheels_for_another_python_are_not_used(named: bool, tmp_path: Path) -> None:
    """This Python's own pip says so."""
    path = fake_python(tmp_path / "bin", install=f'exec {sys.executable} "$@"')
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / ".wheels").mkdir()
    (tmp_path / ".wheels" / "one-1-cp27-cp27m-win32.whl").touch()
    options = {"TMPDIR": str(tmp_path), "VITSCALE_VENV": str(tmp_path / "none")}
    options |= {"WHEELS": str(tmp_path / ".wheels")} if named else {}
    done = run(["bash", str(tmp_path / "launch" / "gpu_suite.sh"), "out"], cwd=tmp_path, path=path, **options)
    reason = "(ERROR: one-1-cp27-cp27m-win32.whl is not a supported wheel on this platform.)"
    python = tmp_path / "bin" / "python3"
    if named:
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert f"WHEELS={tmp_path}/.wheels: must fit {python}; name wheels that do" in line
    else:
        assert (done.returncode, done.stderr) == (0, "")
        line, environment = done.stdout.splitlines()
        assert line == f"{tmp_path}/.wheels is passed over: its wheels do not fit {python} {reason}"
        assert environment == f"PYTHONPATH={tmp_path}"
    assert line.endswith(reason)


def test_a_pip_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "one-1-py3-none-any.whl").touch()
    path = fake_python(tmp_path / "bin", install="printf 'a warning\ndisk full\n' >&2; exit 1")
    options = {"WHEELS": str(tmp_path), "TMPDIR": str(tmp_path), "VITSCALE_VENV": str(tmp_path / "none")}
    done = run(["bash", str(SUITE), "out"], cwd=tmp_path, path=path, **options)
    assert done.returncode == 1
    assert done.stderr == f"gpu_suite.sh: pip could not install the wheels of {tmp_path}: disk full\n"


def test_wheels_are_for_the_machine_that_lacks_them(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin"
    fake_python(python, "python", size=2000)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "old-1-py3-none-any.whl").touch()
    done = run(["bash", str(WHEELS), "wheels"], cwd=tmp_path, VITSCALE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 0, done.stderr
    assert "together: 0 MiB (3000 bytes)" in done.stdout
    names = sorted(path.name for path in (tmp_path / "wheels").iterdir())
    assert names == ["built-1-py3-none-any.whl", "downloaded-1-py3-none-any.whl"]
    (fetched,) = asked(python, "-m pip download")
    assert "--python-version 3.12" in fetched
    for package in ("nvidia-nvimgcodec-cu13", "simplejpeg", "webdataset", "braceexpand", "pydantic", "hjson"):
        assert f" {package}" in fetched
    (built,) = asked(python, "-m pip wheel")
    assert "--no-binary deepspeed" in built


def test_wheels_beyond_the_limit_are_refused_and_none_is_kept(tmp_path: Path) -> None:
    fake_python(tmp_path / "venv" / "bin", "python", size=40 << 20)
    done = run(["bash", str(WHEELS), "wheels"], cwd=tmp_path, VITSCALE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "more than the 40 MiB" in done.stderr
    assert list((tmp_path / "wheels").iterdir()) == []
