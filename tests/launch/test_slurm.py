"""The decisions of launch/slurm.sh that need no cluster; the rest: tests/integration/test_slurm.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.files.web import served, status
from vitscale.errors import LaunchError
from vitscale.files import retry
from vitscale.launch import torchrun
from vitscale.launch.attempts import begin
from vitscale.launch.slurm import finish, job_name, job_state, main, rendezvous_port, slurm_layout
from vitscale.run_folder import RunFolder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process outside of any job, on a machine without Slurm's commands."""
    monkeypatch.setattr(os, "environ", {n: v for n, v in os.environ.items() if not n.startswith("SLURM")})
    os.environ["PATH"] = "/nowhere"


def test_outside_a_job() -> None:
    with pytest.raises(LaunchError, match=r"SLURM_JOB_ID is not set.*sbatch"):
        slurm_layout()
    assert main(["prepare", "pretrain", "c.yaml"]) == 2


def test_a_missing_scontrol_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.update(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]")
    assert main(["prepare", "pretrain", "c.yaml"]) == 2
    assert "scontrol show hostnames n[1-2]" in capsys.readouterr().err


def test_ports_differ_between_jobs_and_their_restarts() -> None:
    ports = [rendezvous_port(job, restarts) for job in range(1000, 1100) for restarts in range(7)]
    assert len(set(ports)) == len(ports)
    for job in (1, 2**31, 67_108_863):
        assert 15000 <= rendezvous_port(job, 12345) < 30000


@pytest.mark.parametrize(
    ("shown", "state"),
    [
        ("JobId=7 JobName=x\n   JobState=RUNNING Reason=None Dependency=(null)", ("RUNNING", "None")),
        ("   JobState=COMPLETING Reason=TimeLimit", ("COMPLETING", "TimeLimit")),
        ("slurm_load_jobs error", ("unknown", "unknown")),
    ],
)
def test_job_state(shown: str, state: tuple[str, str]) -> None:
    assert job_state(shown) == state


def test_a_job_of_an_array_is_named_by_its_task() -> None:
    """SLURM_JOB_ID of the last one is the number of the whole array."""
    os.environ["SLURM_JOB_ID"] = "7"
    assert job_name() == "7"
    os.environ.update(SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="0")
    assert job_name() == "7_0"


@pytest.mark.parametrize(("code", "reason"), [(0, "done"), (1, "OSError"), (2, "data.train: nothing there")])
def test_only_a_stopped_run_is_requeued(
    tmp_path: Path, code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["SLURM_JOB_ID"] = "7"
    folder = RunFolder(tmp_path, "7.0")
    folder.write_exit(code, 5, reason)
    assert finish(folder) == code
    assert reason in capsys.readouterr().out


SCONTROL = """#!/bin/sh
case "$*" in
"show hostnames n1") echo n1 ;;
"show job 7") echo JobState={state} Reason={reason} ;;
*) echo "$*" >> {log} ;;
esac
"""


def put_scontrol(folder: Path, state: str, reason: str) -> None:
    """One that shows job 7 so, on the PATH of that job; what else it is asked for stands in the file `asked`."""
    (folder / "scontrol").write_text(SCONTROL.format(log=folder / "asked", state=state, reason=reason))
    (folder / "scontrol").chmod(0o755)
    os.environ.update(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n1", PATH=f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("state", "reason", "requeued"),
    [("RUNNING", "None", True), ("COMPLETING", "NodeDown", True), ("TIMEOUT", "TimeLimit", True),
     ("CANCELLED", "None", False), ("COMPLETING", "None", False)],
)  # fmt: skip
def test_a_job_ended_by_the_infrastructure(tmp_path: Path, state: str, reason: str, requeued: bool) -> None:
    """Its ranks were killed before they could say why; a cancelled one is never requeued."""
    put_scontrol(tmp_path, state, reason)
    folder = RunFolder(tmp_path, "7.0")
    begin(folder, ranks=2, most_restarts=3)
    folder.write_exit(3, None, "another rank is gone")
    assert finish(folder) == (0 if requeued else 3)
    assert (tmp_path / "asked").exists() == requeued


def test_storage_that_is_away_at_the_start_requeues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """scontrol alone is not Slurm's own here; tests/integration/test_slurm.py requeues by that."""
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 0.02)
    put_scontrol(tmp_path, "RUNNING", "None")
    config = tmp_path / "c.yaml"
    config.write_text(f"{{run: {{dir: {tmp_path}}}, train: {{global_batch: 8, micro_batch: 2, steps: 3}}}}")
    with served() as web:
        web.files["/a.tar"], web.faults["/a.tar"] = b"x", [status(503)] * 1000
        words = ["pretrain", str(config), f"data.train={web.url}/a.tar", "data.patience_s=1"]
        assert torchrun.main(words) == 3
        assert "HTTP 503" in capfd.readouterr().err
        assert main(["prepare", *words]) == 0
        said = capfd.readouterr()
        assert said.out == "", "the run's folder would stand there"
        assert "requeues job 7" in said.err
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
        assert main(["prepare", *words[:2], "data.train=/nowhere/a.tar"]) == 2
