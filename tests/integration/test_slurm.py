"""slurm/*.sh as they are, on a real Slurm of four nodes on this machine, with a small config."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration.processes import ranks_of
from tests.integration.slurm_cluster import SlurmCluster, what_is_missing
from tests.integration.worlds import ROOT, losses, rows, trace
from vitscale.data.index import ShardIndex
from vitscale.models.configuration import ViTConfig
from vitscale.models.vit import ViTModel

SCRIPT = ROOT / "slurm" / "pretrain_vit_h.sh"
STEPS = 100
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
         "patch_size": 8}  # fmt: skip

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def slurm(slurm_required: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    missing = what_is_missing()
    if missing is not None:
        (pytest.fail if slurm_required else pytest.skip)(missing)
    with open("/run/lock/vitscale-tests-slurm", "w") as lock:  # node names and munge are the machine's
        fcntl.flock(lock, fcntl.LOCK_EX)
        with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster


class Submitted:
    """A job of 2 nodes x 2 ranks, submitted as a user would, and its run."""

    def __init__(
        self, slurm: SlurmCluster, folder: Path, config: Path, shards: Path, *more: str, array: str | None = None
    ) -> None:
        self.slurm, self.folder = slurm, folder
        self.log, self.run = folder / "job.log", folder / "runs" / "run"
        environment = {
            "VITSCALE_HOME": str(ROOT),
            "VITSCALE_VENV": sys.prefix,
            "CONFIG": str(config),
            "DATA": f"{shards}/*.tar",
            "NPROC_PER_NODE": "2",
            "CUDA_VISIBLE_DEVICES": "",
        }
        flags = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1", f"--output={self.log}")
        flags += () if array is None else (f"--array={array}",)
        arguments = (*flags, str(SCRIPT), f"train.steps={STEPS}", *more)
        self.job = slurm.submit(*arguments, cwd=folder, environment=environment)

    def steps(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def wait_for_steps(self, count: int) -> None:
        self.slurm.wait_for(f"{count} steps", lambda: self.steps() >= count, 240, self.log)

    def wait_for_end(self) -> dict[str, str]:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.slurm.wait_for("the job's end", lambda: self.slurm.state(self.job)["JobState"] in over, 300, self.log)
        return self.slurm.state(self.job)

    def assert_whole(self) -> None:
        """Every step once, though the run was interrupted; each sample at most once an epoch."""
        assert sorted(losses(self.run)) == list(range(1, STEPS + 1))
        assert [row["step"] for row in rows(self.run)] == list(range(1, STEPS + 1))
        names = trace(self.run)
        epoch = [key for step in range(1, 10) for key in names[step]]  # 150 samples: 9 steps of 16
        assert len(set(epoch)) == len(epoch) == 9 * 16
        exit_record = json.loads((self.run / "exit.json").read_text())
        assert exit_record.items() >= {"code": 0, "step": STEPS, "reason": "done"}.items()
        assert (self.run / "model" / "model.safetensors").exists()


def test_stopped_by_a_signal_requeued_and_finished(
    slurm: SlurmCluster, config: Path, shards: Path, tmp_path: Path
) -> None:
    job = Submitted(slurm, tmp_path, config, shards)
    job.wait_for_steps(3)
    slurm.command("scancel", "--signal=USR1", "--batch", str(job.job))  # as --signal=B:USR1@120 near the time limit
    slurm.wait_for("a requeue", lambda: slurm.state(job.job)["Restarts"] == "1", 120, job.log)
    assert 3 <= job.steps() < STEPS
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1")
    job.assert_whole()

    log = job.log.read_text()  # one log for both starts
    assert f"requeues job {job.job}" in log
    assert log.count("start:") == 2
    assert not (job.run / "stop").exists()
    kept = sorted((job.run / "launch").iterdir())
    assert len(kept) == 2
    for snapshot in kept:
        assert (snapshot / "slurm.sh").read_text().strip() == SCRIPT.read_text().strip()
        assert (snapshot / "config.yaml").read_text() == config.read_text()
        assert (snapshot / "command.txt").read_text().startswith("launch/slurm.sh pretrain ")
        assert f"JobId={job.job}" in (snapshot / "job.txt").read_text()
        assert (snapshot / "code.txt").read_text().startswith("vitscale ")


def test_a_bad_config_ends_the_job_at_once(slurm: SlurmCluster, config: Path, shards: Path, tmp_path: Path) -> None:
    job = Submitted(slurm, tmp_path, config, shards, "train.global_batch=18")
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    lines = [line for line in job.log.read_text().splitlines() if "error" in line]
    assert len(lines) == 1
    assert "train.global_batch=18" in lines[0]
    assert "4 ranks" in lines[0]
    assert not job.run.exists()


def test_submitted_by_the_verb(slurm: SlurmCluster, config: Path, shards: Path, tmp_path: Path) -> None:
    words = ["submit", str(config), "--nodes", "2", "--gpus-a-node", "2", f"data.train={shards}/*.tar"]
    words += ["--option=--hold", f"--option=--output={tmp_path / 'job.log'}"]
    said = slurm.command(sys.executable, "-m", "vitscale", *words, cwd=tmp_path)
    job = said.split()[-1]
    try:
        assert said.startswith("Submitted batch job ")
        state = slurm.state(job)
        assert (state["JobName"], state["NumNodes"], state["Requeue"]) == ("run", "2-2", "1")
        assert state["Command"].startswith(str(SCRIPT))
    finally:
        slurm.command("scancel", job)
    with pytest.raises(AssertionError, match=r"vitscale: error: sbatch: .*[Pp]artition"):
        slurm.command(sys.executable, "-m", "vitscale", *words, "--option=--partition=none", cwd=tmp_path)


def test_an_index_by_an_array(slurm: SlurmCluster, shards: Path, tmp_path: Path) -> None:
    """Four tasks on as many nodes, in any order."""
    out, logs = tmp_path / "index.json", str(tmp_path / "%a.log")
    environment = {"VITSCALE_HOME": str(ROOT), "VITSCALE_VENV": sys.prefix, "OUT": str(out)}
    arguments = ("--array=1-4", "--cpus-per-task=1", f"--output={logs}", str(ROOT / "slurm" / "index.sh"))
    slurm.submit(*arguments, f"{shards}/*.tar", cwd=tmp_path, environment=environment)
    slurm.wait_for("the index", out.exists, 240, tmp_path / "1.log")
    made, packed = ShardIndex.load(out), ShardIndex.load(shards / "index.json")
    assert (made.digest, made.sha256) == (packed.digest, packed.sha256)


@pytest.mark.full
def test_an_evaluation_on_two_nodes(slurm: SlurmCluster, shards: Path, tmp_path: Path) -> None:
    """One that scores, and one that is refused, beside each other; neither is requeued."""
    ViTModel(ViTConfig(**SIZES)).save_pretrained(tmp_path / "model")
    environment = {"VITSCALE_VENV": sys.prefix, "NPROC_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def submitted(name: str, test: str) -> Callable[[], dict[str, str]]:
        words = f"{tmp_path}/model --out {tmp_path}/{name} evaluation.train={shards}/*.tar evaluation.test={test}"
        script = f"set -f; bash {ROOT}/launch/slurm.sh evaluate {words}"
        flags = ("--nodes=2", "--ntasks-per-node=1", "--requeue", f"--output={tmp_path}/{name}.log")
        return partial(slurm.state, slurm.submit(*flags, f"--wrap={script}", cwd=tmp_path, environment=environment))

    jobs = submitted("scores", f"{shards}/*.tar"), submitted("none", "/nowhere/*.tar")
    over = ("COMPLETED", "FAILED")
    logs = tmp_path / "scores.log"
    slurm.wait_for("both ends", lambda: all(job()["JobState"] in over for job in jobs), 300, logs)
    ended = [(job()["JobState"], job()["ExitCode"], job()["Restarts"]) for job in jobs]
    assert ended == [("COMPLETED", "0:0", "0"), ("FAILED", "2:0", "0")], logs.read_text()
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["evaluation"]["test"] == 150
    assert "/nowhere/*.tar" in (tmp_path / "none.log").read_text()


@pytest.mark.full
def test_a_cancelled_job_saves_and_stays_cancelled(
    slurm: SlurmCluster, config: Path, shards: Path, tmp_path: Path
) -> None:
    job = Submitted(slurm, tmp_path, config, shards)
    job.wait_for_steps(3)
    slurm.command("scancel", str(job.job))
    assert job.wait_for_end()["JobState"] == "CANCELLED"
    assert "not requeued" in job.log.read_text()
    assert json.loads((job.run / "exit.json").read_text())["code"] == 3
    assert list((job.run / "checkpoints").glob("step_*"))


@pytest.mark.full
def test_a_preempted_job_goes_on(slurm: SlurmCluster, config: Path, shards: Path, tmp_path: Path) -> None:
    job = Submitted(slurm, tmp_path, config, shards)
    job.wait_for_steps(3)
    whole = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    slurm.submit(*whole, cwd=tmp_path, environment={})
    slurm.wait_for("a requeue", lambda: slurm.state(job.job)["Restarts"] == "1", 120, job.log)
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0")
    job.assert_whole()


@pytest.mark.full
def test_an_array_of_two_configs(slurm: SlurmCluster, config: Path, shards: Path, tmp_path: Path) -> None:
    """Each a run of its own; a stopped one is requeued, and the other one left alone."""
    for task in (0, 1):
        (tmp_path / f"config-{task}.yaml").write_text(config.read_text())
    array = Submitted(slurm, tmp_path, tmp_path / "config-%a.yaml", shards, "run.name=run-%a", array="0-1")
    runs = [tmp_path / "runs" / f"run-{task}" for task in (0, 1)]

    def steps(run: Path) -> int:
        return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0

    slurm.wait_for("both runs", lambda: min(map(steps, runs)) >= 3, 240, array.log)
    slurm.command("scancel", "--signal=USR1", "--batch", f"{array.job}_1")
    first, second = (partial(slurm.state, f"{array.job}_{task}") for task in (0, 1))
    slurm.wait_for("a requeue", lambda: second()["Restarts"] == "1", 120, array.log)
    slurm.wait_for("the end", lambda: first()["JobState"] == second()["JobState"] == "COMPLETED", 300, array.log)
    assert (first()["Restarts"], second()["Restarts"]) == ("0", "1")
    for run in runs:
        assert sorted(losses(run)) == list(range(1, STEPS + 1))


@pytest.mark.full
def test_a_job_whose_rank_dies_goes_on(slurm: SlurmCluster, config: Path, shards: Path, tmp_path: Path) -> None:
    """No rank and no node may hang on after it."""
    job = Submitted(slurm, tmp_path, config, shards, "checkpoint.every_steps=10")
    job.wait_for_steps(15)
    ranks = ranks_of(config)
    assert len(ranks) == 4
    os.kill(ranks[-1], signal.SIGKILL)
    slurm.wait_for("a requeue", lambda: slurm.state(job.job)["Restarts"] == "1", 120, job.log)
    assert ranks_of(config) == []
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1")
    job.assert_whole()
    assert [row.get("code") for row in rows(job.run, "attempts.jsonl")] == [None, 3, None, 0]
    assert "ended by the infrastructure: " in job.log.read_text()
