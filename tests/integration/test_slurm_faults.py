"""What can happen to a Slurm job in a month, on a real Slurm of four nodes: a job of two goes through it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_slurm import STEPS, Submitted, slurm  # noqa: F401 - a fixture
from tests.integration.worlds import losses

pytestmark = pytest.mark.slurm

Submit = Callable[..., Submitted]


@pytest.fixture
def submit(slurm, tmp_path: Path, config: Path, shards: Path) -> Submit:  # noqa: F811
    return lambda *more: Submitted(slurm, tmp_path, config, shards, *more)


def wait_for_restart(job: Submitted, count: int) -> None:
    job.slurm.wait_for(f"start {count + 1}", lambda: job.slurm.state(job.job)["Restarts"] == str(count), 180, job.log)


def assert_goes_on_to_the_end(job: Submitted) -> None:
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.log.read_text()[-3000:]
    job.assert_whole()


@pytest.mark.full
def test_near_its_time_limit_three_times(submit: Submit) -> None:
    job = submit()
    for restarts in range(3):
        job.wait_for_steps(job.steps() + 5)  # the run saves where it stops, and goes on from there
        job.slurm.command("scancel", "--signal=USR1", "--batch", str(job.job))
        wait_for_restart(job, restarts + 1)
    assert_goes_on_to_the_end(job)
    assert job.log.read_text().count("start:") == 4


@pytest.mark.full
def test_requeued_by_hand(submit: Submit) -> None:
    job = submit("checkpoint.every_steps=10")
    job.wait_for_steps(12)
    job.slurm.command("scontrol", "requeue", str(job.job))
    wait_for_restart(job, 1)
    assert_goes_on_to_the_end(job)


def test_a_node_is_lost(submit: Submit) -> None:
    job = submit("checkpoint.every_steps=10")
    job.wait_for_steps(12)
    lost = job.slurm.state(job.job)["NodeList"].removeprefix("node[")[0]
    try:
        job.slurm.command("scontrol", "update", f"nodename=node{lost}", "state=down", "reason=test")
        wait_for_restart(job, 1)
        assert_goes_on_to_the_end(job)
    finally:
        if "DOWN" in job.slurm.command("scontrol", "show", "node", f"node{lost}"):  # it may have come back by itself
            job.slurm.command("scontrol", "update", f"nodename=node{lost}", "state=resume")


@pytest.mark.full
def test_another_count_of_nodes(submit: Submit) -> None:
    job = submit()
    job.wait_for_steps(5)
    before = losses(job.run)
    job.slurm.command("scontrol", "requeuehold", str(job.job))
    job.slurm.wait_for("a held job", lambda: job.slurm.state(job.job)["JobState"] == "PENDING", 120, job.log)
    job.slurm.command("scontrol", "update", f"job={job.job}", "numnodes=1")
    job.slurm.command("scontrol", "release", str(job.job))
    assert_goes_on_to_the_end(job)
    after = losses(job.run)
    assert {step: after[step] for step in before} == pytest.approx(before, rel=1e-5)
