"""What the launcher's variables mean, and what is set before the libraries are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitscale import world
from vitscale.errors import LaunchError
from vitscale.world import World, child_environment, enter, read_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that no launcher started, on a machine without a GPU; what `enter` sets is taken back."""
    monkeypatch.setattr(os, "environ", {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delitem(os.environ, name, raising=False)
    return monkeypatch


def test_no_launcher_is_one_process(environment: pytest.MonkeyPatch) -> None:
    assert read_world() == World(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu")
    assert read_world().is_main


def test_torchruns_variables(environment: pytest.MonkeyPatch) -> None:
    os.environ.update(TORCHRUN)
    assert read_world() == World(rank=5, world_size=8, local_rank=1, local_world_size=4, device="cpu")
    assert not read_world().is_main


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"WORLD_SIZE": None}, ["WORLD_SIZE=None"]),
        ({"LOCAL_RANK": "first"}, ["LOCAL_RANK='first'", "whole number"]),
        ({"RANK": ""}, ["RANK=''"]),
        ({"RANK": "8"}, ["RANK=8", "WORLD_SIZE=8"]),
        ({"RANK": "-1"}, ["RANK=-1"]),
        ({"LOCAL_RANK": "4"}, ["LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"]),
    ],
)
def test_what_no_launcher_sets(
    environment: pytest.MonkeyPatch, changed: dict[str, str | None], words: list[str]
) -> None:
    os.environ.update({name: value for name, value in {**TORCHRUN, **changed}.items() if value is not None})
    with pytest.raises(LaunchError) as caught:
        read_world()
    for word in [*words, "launch/torchrun.sh"]:
        assert word in str(caught.value)


def test_cores_are_shared_out() -> None:
    cores = len(os.sched_getaffinity(0))
    assert World().cores_per_rank == cores
    assert World(world_size=2, local_world_size=2).cores_per_rank == max(1, cores // 2)
    assert World(world_size=4096, local_world_size=4096).cores_per_rank == 1


def test_enter_sets_what_libraries_read(environment: pytest.MonkeyPatch) -> None:
    assert enter() == World()
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert enter() == World()  # what it set means the same to the next who reads


@pytest.mark.parametrize(("per_node", "threads"), [("1", "32"), ("8", "16")])
def test_compiling_processes_are_shared_out(environment: pytest.MonkeyPatch, per_node: str, threads: str) -> None:
    environment.setattr(os, "sched_getaffinity", lambda _: range(128))
    os.environ.update(TORCHRUN, LOCAL_RANK="0", LOCAL_WORLD_SIZE=per_node)
    enter()
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == threads


def test_enter_leaves_the_users_values(environment: pytest.MonkeyPatch) -> None:
    os.environ.update(TORCHRUN, MASTER_ADDR="elsewhere", MLFLOW_HTTP_REQUEST_TIMEOUT="60")
    enter()
    assert (os.environ["MASTER_ADDR"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) == ("elsewhere", "60")
    assert os.environ["RANK"] == "5"


def test_enter_on_a_gpu_leaves_the_accelerator_to_deepspeed(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(world, "_device", lambda: "cuda")
    assert enter().device == "cuda"
    assert "DS_ACCELERATOR" not in os.environ


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_not_there(environment: pytest.MonkeyPatch, hidden: str) -> None:
    environment.setattr(os.path, "exists", lambda path: True)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    assert read_world().device == "cuda"
    os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    assert read_world().device == "cpu"


def test_a_helper_process_is_no_rank(environment: pytest.MonkeyPatch) -> None:
    os.environ.update(TORCHRUN, MASTER_ADDR="a", MASTER_PORT="1", KEPT="yes")
    given = child_environment()
    assert given["KEPT"] == "yes"
    assert not {*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"} & set(given)


def test_it_is_light() -> None:
    """Importing it must not import what it prepares the environment for."""
    code = "import sys, vitscale.world; print([n for n in ('torch', 'numpy', 'deepspeed') if n in sys.modules])"
    root = Path(world.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
