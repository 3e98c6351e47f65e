"""What launch/torchrun.sh does before and after the ranks: layout, checks, the folder, the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitscale.cli import main as vitscale
from vitscale.errors import ConfigError, LaunchError
from vitscale.launch import torchrun
from vitscale.launch.torchrun import (
    Layout,
    describe_exit,
    main,
    prepare,
    ranks_per_node,
    read_config,
    read_layout,
    whole_number,
)
from vitscale.run_folder import BAD_INPUT, DONE, STOPPED, RunFolder

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("NPROC_PER_NODE", "NNODES", "RDZV_ENDPOINT", "RDZV_ID", "OMP_NUM_THREADS", "SLURM_JOB_ID", "RANK")
CONFIG = """\
train: {{global_batch: 8, micro_batch: 2, steps: 3}}
data: {{lanes: 4, window: 4}}
run: {{name: r, dir: {}}}
"""
HOLD = """
import sys
from pathlib import Path
from vitscale.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    for name in VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(tmp_path / "runs"))
    return path


def test_one_rank_needs_no_torchrun() -> None:
    assert Layout().command(["pretrain", "c.yaml"]) == [sys.executable, "-m", "vitscale.cli", "pretrain", "c.yaml"]


def test_ranks_of_one_node_are_standalone() -> None:
    command = Layout(per_node=4).command(["pretrain", "c.yaml", "a=b"])
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=4"} <= set(command)
    assert command[-5:] == ["-m", "vitscale.cli", "pretrain", "c.yaml", "a=b"]


def test_several_nodes_meet() -> None:
    layout = Layout(nodes=3, per_node=1, endpoint="n1:15000", run_id="7.0", is_host=False, address="n2")
    command = layout.command(["pretrain", "c.yaml"])
    wanted = {"--nnodes=3", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:15000", "--rdzv-id=7.0"}
    assert wanted <= set(command)
    assert "--local-addr=n2" in command
    assert "is_host=False" in next(word for word in command if word.startswith("--rdzv-conf="))
    assert "is_host" not in " ".join(Layout(nodes=3, endpoint="n1:15000").command([]))
    assert layout.ranks == 3


def test_torchrun_takes_these_arguments() -> None:
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config
    from torch.distributed.run import get_args_parser

    layout = Layout(nodes=2, per_node=2, endpoint="n1:15000", is_host=True, address="n1")
    parsed = get_args_parser().parse_args(layout.command(["pretrain", "c.yaml", "x=1"])[3:])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2", "2", "n1:15000")
    assert parsed.module
    assert (parsed.training_script, parsed.training_script_args) == ("vitscale.cli", ["pretrain", "c.yaml", "x=1"])
    assert _parse_rendezvous_config(parsed.rdzv_conf)["is_host"] == "True"


def test_cores_are_shared_out_unless_the_user_said() -> None:
    cores = len(os.sched_getaffinity(0))
    assert Layout(per_node=2).environment()["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert Layout(per_node=4096).environment()["OMP_NUM_THREADS"] == "1"
    os.environ["OMP_NUM_THREADS"] = "3"
    assert Layout(per_node=2).environment()["OMP_NUM_THREADS"] == "3"


def test_what_another_launcher_left_is_not_the_ranks() -> None:
    os.environ.update(RANK="3", WORLD_SIZE="4", MASTER_ADDR="10.255.255.1", TORCHELASTIC_RUN_ID="none")
    assert ranks_per_node() == 1
    assert Layout().world().world_size == 1
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & Layout().environment().keys()


def test_layout_of_the_environment() -> None:
    assert read_layout() == Layout(nodes=1, per_node=1)
    os.environ.update(NPROC_PER_NODE="3", NNODES="2", RDZV_ENDPOINT="host:1234", RDZV_ID="x")
    assert read_layout() == Layout(nodes=2, per_node=3, endpoint="host:1234", run_id="x")
    del os.environ["RDZV_ENDPOINT"]
    with pytest.raises(LaunchError, match=r"NNODES=2: needs RDZV_ENDPOINT=HOST:PORT"):
        read_layout()


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_counts_are_whole_numbers(text: str) -> None:
    os.environ["NNODES"] = text
    with pytest.raises(LaunchError, match=rf"NNODES='{text}'"):
        whole_number("NNODES", 1)


def test_an_empty_variable_is_none() -> None:
    os.environ["NNODES"] = ""
    assert whole_number("NNODES", 5) == 5


def test_one_rank_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "local_device", lambda: "cuda")
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,2,5"
    assert ranks_per_node() == 3
    os.environ["NPROC_PER_NODE"] = "2"
    assert ranks_per_node() == 2
    os.environ["NPROC_PER_NODE"] = "4"
    with pytest.raises(LaunchError, match=r"NPROC_PER_NODE=4: this node shows 3 GPUs"):
        ranks_per_node()


@pytest.mark.parametrize("number", torchrun.STOP_SIGNALS)
def test_a_signal_before_there_are_ranks(
    number: signal.Signals, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While shards are counted, say: there is nothing to save, and the same command starts again."""

    def busy(*_: object) -> RunFolder:
        os.kill(os.getpid(), number)
        time.sleep(30)
        raise AssertionError("nobody heard it")

    def heard(*_: object) -> None:
        raise AssertionError("it was still here")

    first = signal.signal(number, heard)
    monkeypatch.setattr(torchrun, "prepare", busy)
    try:
        assert main(["pretrain", str(config)]) == STOPPED
        assert "stopped before there were ranks" in capsys.readouterr().err
        assert signal.getsignal(number) is heard
    finally:
        signal.signal(number, first)


def test_what_is_ignored_stays_ignored() -> None:
    """As nohup starts a program."""
    first = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with torchrun.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, first)


def test_a_stop_file_before_there_are_ranks(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`vitscale stop` is heard as soon as what an earlier start left is cleared away."""
    folder = RunFolder(tmp_path / "runs" / "r")

    def busy(*_: object, **__: object) -> None:
        folder.config.touch()
        assert vitscale(["stop", str(folder.path)]) == DONE
        time.sleep(30)
        raise AssertionError("nobody heard it")

    monkeypatch.setattr(torchrun, "_prepare_data", busy)
    assert main(["pretrain", str(config)]) == STOPPED
    assert "stopped before there were ranks" in capsys.readouterr().err
    assert not folder.is_held()
    assert vitscale(["stop", str(folder.path)]) == BAD_INPUT
    assert "no run holds this folder" in capsys.readouterr().err


def test_what_prepare_announces_is_withdrawn_once_the_ranks_have_ended(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is still importing has no lease, but the folder is held."""
    folder = prepare(["pretrain", str(config)], Layout(), "launch/torchrun.sh")
    assert folder.is_held()
    assert not folder.is_taken()
    looks = (
        f"from vitscale.run_folder import *; import sys; sys.exit(7 * RunFolder(Path({str(folder.path)!r})).is_held())"
    )
    monkeypatch.setattr(Layout, "command", lambda self, arguments: [sys.executable, "-c", looks])
    with torchrun.interruptible():  # which puts the handlers of signals back
        assert torchrun.supervise(["pretrain", str(config)], Layout(), folder) == 7
    assert not folder.is_held()


def test_prepare_clears_what_an_earlier_start_left(config: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "r")
    folder.path.mkdir(parents=True)
    folder.stop.touch()
    assert folder.write_exit(0, 5, "done")
    assert prepare(["pretrain", str(config)], Layout(per_node=2), "launch/torchrun.sh") == folder
    assert folder.read_exit() is None
    assert not folder.stop.exists()
    assert len(list((folder.path / "launch").iterdir())) == 1


def test_prepare_checks_against_the_world_to_be(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch=8.*3 ranks"):
        prepare(["pretrain", str(config)], Layout(per_node=3), "launch/torchrun.sh")
    assert not (tmp_path / "runs").exists()


def test_prepare_refuses_a_folder_in_use(config: Path) -> None:
    run = read_config(["pretrain", str(config)]).run
    folder = RunFolder.at(run.dir, run.name)
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LaunchError, match=f"in use by process {holder.pid} on"):
            prepare(["pretrain", str(config)], Layout(), "launch/torchrun.sh")
        holder.communicate("\n")
    prepare(["pretrain", str(config)], Layout(), "launch/torchrun.sh")


@pytest.mark.parametrize("arguments", [["c.yaml"], ["export", "c.yaml"], ["pretrain"]])
def test_arguments_that_mean_nothing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "must be pretrain, finetune or doctor CONFIG.yaml [dotted.key=value ...], or evaluate RUN|MODEL" in said


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "NPROC_PER_NODE" in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "failed: the ranks ended before the run began"),
        ({"code": 0, "step": 9, "reason": "done"}, "done at step 9"),
        ({"code": 3, "step": 4, "reason": "stopped on request"}, "stopped on request at step 4"),
        ({"code": 2, "step": None, "reason": "x=1: must be 2"}, "error: x=1: must be 2"),
        ({"code": 1, "step": 7, "reason": "OSError: no space"}, "failed at step 7: OSError: no space"),
    ],
)
def test_how_a_run_ended_in_words(said: dict[str, object] | None, words: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    if said is not None:
        folder.exit.write_text(json.dumps(said))
    assert describe_exit(folder).startswith(f"{tmp_path}: {words}")
