"""The decisions of launch/slurm.sh that need no cluster; the rest: tests/integration/test_slurm.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitscale.errors import LaunchError
from vitscale.launch.slurm import finish, job_state, main, rendezvous_port, slurm_layout
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
        ("JobId=7 JobName=x\n   JobState=RUNNING Reason=None Dependency=(null)", "RUNNING"),
        ("   JobState=CANCELLED Reason=None", "CANCELLED"),
        ("slurm_load_jobs error", "unknown"),
    ],
)
def test_job_state(shown: str, state: str) -> None:
    assert job_state(shown) == state


@pytest.mark.parametrize(("code", "reason"), [(0, "done"), (1, "OSError"), (2, "data.train: nothing there")])
def test_only_a_stopped_run_is_requeued(
    tmp_path: Path, code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["SLURM_JOB_ID"] = "7"
    folder = RunFolder(tmp_path)
    folder.write_exit(code, 5, reason)
    assert finish(folder) == code
    assert reason in capsys.readouterr().out


def test_a_run_that_said_nothing_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["SLURM_JOB_ID"] = "7"
    assert finish(RunFolder(tmp_path)) == 1
    assert "no exit.json" in capsys.readouterr().out
