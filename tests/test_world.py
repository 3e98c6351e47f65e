"""What the launcher's variables mean, and what is set before the libraries are imported."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vitscale import world
from vitscale.errors import LaunchError
from vitscale.world import World, _quota, child_environment, enter, local_device, read_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
TORCHRUN |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that no launcher started, on a machine without a GPU; what `enter` sets is taken back."""
    monkeypatch.setattr(os, "environ", {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    for name in (*TORCHRUN, "DS_ACCELERATOR", "TORCHINDUCTOR_COMPILE_THREADS", "SLURM_PROCID", "SLURM_NTASKS_PER_NODE"):
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
        ({"WORLD_SIZE": "many"}, ["WORLD_SIZE='many'"]),
        ({"MASTER_ADDR": None}, ["MASTER_ADDR", "WORLD_SIZE=8"]),
        ({"LOCAL_RANK": "first"}, ["LOCAL_RANK='first'", "whole number"]),
        ({"RANK": "8"}, ["RANK=8", "WORLD_SIZE=8"]),
        ({"RANK": "-1"}, ["RANK=-1"]),
        ({"LOCAL_RANK": "4"}, ["LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"]),
        ({"LOCAL_RANK": None}, ["LOCAL_RANK=None", "whole number"]),
        ({"LOCAL_WORLD_SIZE": None}, ["LOCAL_RANK=1", "LOCAL_WORLD_SIZE", "export it"]),
        ({"RANK": "\u00b2"}, ["RANK='\u00b2'", "whole number"]),
        ({"WORLD_SIZE": "--8"}, ["WORLD_SIZE='--8'", "whole number"]),
        ({"WORLD_SIZE": "1"}, ["RANK=5", "WORLD_SIZE=1"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT='http'", "whole number"]),
        ({"MASTER_PORT": "65536"}, ["MASTER_PORT=65536", "65535"]),
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


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500", "LOCAL_RANK": "3"},
        {"RANK": "3"},
        {"RANK": "", "WORLD_SIZE": "8", "GROUP_RANK": "1"},
        {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        {"ROLE_RANK": "2", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "0"},
        {"OMPI_COMM_WORLD_LOCAL_RANK": "2", "PMI_SIZE": "4", "MV2_COMM_WORLD_SIZE": "4"},
    ],
)
def test_leftovers_of_a_launcher_are_ignored_and_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: dict[str, str]
) -> None:
    os.environ.update(left)
    assert enter(on_ranks=True) == World()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(f"{name}={value}" in error for name, value in left.items())
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "0")
    assert not [name for name in left if name.startswith(("OMPI", "PMI", "MV2", "TORCHELASTIC")) and name in os.environ]
    assert enter(on_ranks=True) == World()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("left", [{"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, {"MASTER_ADDR": "10.255.255.1"}])
def test_one_rank_of_one_is_a_single_process(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: dict[str, str]
) -> None:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1"} | left)
    assert enter(on_ranks=True) == World()
    error = capsys.readouterr().err
    assert all(f"{name}={value}" in error for name, value in left.items())
    assert " RANK=0" not in error  # which it is
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("0", "1")


def test_what_has_no_ranks_takes_none(environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.update({"RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "none"})
    assert enter() == World()
    assert "RANK=3, WORLD_SIZE=4, MASTER_PORT=none: " in capsys.readouterr().err


def test_the_local_world_of_srun(environment: pytest.MonkeyPatch) -> None:
    """RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID, as many write it."""
    os.environ |= TORCHRUN | {"SLURM_NTASKS_PER_NODE": "2"}
    del os.environ["LOCAL_WORLD_SIZE"]
    assert read_world() == World(rank=5, world_size=8, local_rank=1, local_world_size=2)


@pytest.mark.parametrize("rank", ["0", "5"])
def test_what_would_change_a_run_past_its_config_is_taken_away(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    left = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_MIXED_PRECISION": "fp8", "FSDP_OFFLOAD_PARAMS": "true"}
    os.environ.update(TORCHRUN | left | {"RANK": rank, "DS_ACCELERATOR": "cuda"})
    enter(on_ranks=True)
    assert not left.keys() & os.environ.keys()
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert capsys.readouterr().err.count("ACCELERATE_DYNAMO_BACKEND=INDUCTOR") == (rank == "0")


def test_kubeflows_variables(environment: pytest.MonkeyPatch) -> None:
    """One process a pod: it has no local rank."""
    os.environ.update(RANK="3", WORLD_SIZE="4", MASTER_ADDR="job-master-0", MASTER_PORT="23456")
    assert enter(on_ranks=True) == World(rank=3, world_size=4, local_rank=0, local_world_size=1, device="cpu")
    assert os.environ["MASTER_ADDR"] == "job-master-0"
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("0", "1")  # what accelerate goes by
    os.environ.update(RANK="0", WORLD_SIZE="1")
    assert enter(on_ranks=True) == World()
    assert os.environ["MASTER_PORT"] == "0"  # of a single process: any free one


@pytest.mark.parametrize(
    "number",
    ["SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID", "FLUX_TASK_RANK"],
)
def test_a_second_process_without_ranks_is_refused(environment: pytest.MonkeyPatch, number: str) -> None:
    for first in ("0", "", "abc"):
        os.environ[number] = first
        enter(on_ranks=True)
    os.environ[number] = "1"
    with pytest.raises(LaunchError, match=rf"{number}=1: .*launch/slurm.sh .*torchrun"):
        enter(on_ranks=True)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}  # which a container's image may have set for each of them
    with pytest.raises(LaunchError, match=f"{number}=1"):
        enter(on_ranks=True)
    enter()  # no training: it may be started as often as one likes
    os.environ |= TORCHRUN | {number: "1"}
    enter(on_ranks=True)


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
    enter(on_ranks=True)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == threads


def test_what_stands_in_a_profile_or_a_notebook_stops_no_single_process(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="ib0", NCCL_SOCKET_IFNAME="ib0", MPLBACKEND="module://matplotlib_inline")
    enter(on_ranks=True)
    assert "GLOO_SOCKET_IFNAME=ib0, NCCL_SOCKET_IFNAME=ib0: " in capsys.readouterr().err
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & os.environ.keys()
    assert os.environ["MPLBACKEND"] == "agg"
    os.environ.update(TORCHRUN, GLOO_SOCKET_IFNAME="ib0")
    enter(on_ranks=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(("text", "threads"), [("2,1", "2"), ("", None), ("many", None), ("0", None), ("3", "3")])
def test_threads_are_one_number(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, threads: str | None
) -> None:
    os.environ["OMP_NUM_THREADS"] = text
    expected = threads or str(World().cores_per_rank)
    enter()
    assert os.environ["OMP_NUM_THREADS"] == expected
    told = f"environment: OMP_NUM_THREADS={text}: must be a whole number above 0; {expected} is taken\n"
    assert capsys.readouterr().err == ("" if text == threads else told)


def test_enter_leaves_the_users_values(environment: pytest.MonkeyPatch) -> None:
    os.environ.update(TORCHRUN, MASTER_ADDR="elsewhere", MLFLOW_HTTP_REQUEST_TIMEOUT="60")
    enter(on_ranks=True)
    assert (os.environ["MASTER_ADDR"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) == ("elsewhere", "60")
    assert os.environ["RANK"] == "5"


def test_enter_on_a_gpu_leaves_the_accelerator_to_deepspeed(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(world, "local_device", lambda: "cuda")
    assert enter().device == "cuda"
    assert "DS_ACCELERATOR" not in os.environ


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_not_there(environment: pytest.MonkeyPatch, hidden: str) -> None:
    environment.setattr(os.path, "exists", lambda path: True)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    assert local_device() == "cuda"
    os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    assert local_device() == "cpu"


def test_a_helper_process_is_no_rank(environment: pytest.MonkeyPatch) -> None:
    os.environ.update(TORCHRUN, KEPT="yes")
    given = child_environment()
    assert given["KEPT"] == "yes"
    assert not {*TORCHRUN} & set(given)


def test_it_is_light() -> None:
    """Importing it must not import what it prepares the environment for."""
    code = "import sys, vitscale.world; print([n for n in ('torch', 'numpy', 'deepspeed') if n in sys.modules])"
    root = Path(world.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_cores_are_those_of_the_control_group(tmp_path: Path) -> None:
    own, groups = tmp_path / "cgroup", tmp_path / "groups"
    job = groups / "slurm" / "job"
    for folder, limit in ((groups, "max 100000"), (groups / "slurm", "800000 100000"), (job, "150000 100000")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(limit)
    own.write_text("0::/slurm/job\n")
    assert _quota(own, groups) == 1.5
    (job / "cpu.max").write_text("max 100000")
    assert _quota(own, groups) == 8, "one above it has a limit"
    older = groups / "cpu" / "box"
    older.mkdir(parents=True)
    (older / "cpu.cfs_quota_us").write_text("-1\n")
    (older / "cpu.cfs_period_us").write_text("100000\n")
    own.write_text("4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n")
    assert _quota(own, groups) == math.inf
    (older / "cpu.cfs_quota_us").write_text("300000\n")
    assert _quota(own, groups) == 3
    own.write_text("2:cpu,cpuacct:/not/seen/from/here\n0::/\n")
    assert _quota(own, groups) == math.inf
    assert _quota(tmp_path / "none", groups) == math.inf


@pytest.mark.usefixtures("environment")
def test_a_process_may_open_as_many_files_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = max(map(int, os.listdir("/proc/self/fd"))) + 64  # those of earlier tests may be open still
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        world.enter()
        assert world.open_files_limit() == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("name", "value", "other"), [
    ("TORCH_GLOO_LAZY_INIT", "1", "0"), ("RES_OPTIONS", "timeout:1 attempts:4", "timeout:2"),
])  # fmt: skip
def test_ranks_meet_by_what_suits_many_of_them_unless_told_otherwise(name: str, value: str, other: str) -> None:
    os.environ.pop(name, None)
    world.enter()
    assert os.environ[name] == value
    os.environ[name] = other
    world.enter()
    assert os.environ[name] == other
