"""The steps of launch/slurm.sh that need more than a shell: prepare, node, finish.

`prepare pretrain CONFIG ...` in the batch shell prints the run's folder; `node pretrain CONFIG ...`
is what srun starts once a node; `finish FOLDER` in the batch shell requeues the job or ends it.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vitscale.errors import LaunchError, VitscaleError
from vitscale.launch.torchrun import (
    Layout,
    describe_exit,
    examine,
    interruptible,
    prepare,
    ranks_per_node,
    read_config,
    supervise,
    whole_number,
)
from vitscale.run_folder import BAD_INPUT, DONE, FAILED, STOPPED, RunFolder
from vitscale.text import redact


def slurm_layout() -> Layout:
    """The Layout of this job: one torchrun a node, meeting on the job's first node."""
    job, names = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
    if not job or not names:
        raise LaunchError("SLURM_JOB_ID is not set: launch/slurm.sh runs inside a job; submit with sbatch slurm/*.sh")
    nodes = whole_number("SLURM_JOB_NUM_NODES", 1)
    first = _scontrol("show", "hostnames", names).split()[0]
    return Layout(
        nodes=nodes,
        per_node=ranks_per_node(),
        endpoint=f"{first}:{rendezvous_port(int(job), restarts())}",
        run_id=f"{job}.{restarts()}",
        is_host=os.environ.get("SLURM_NODEID", "0") == "0",
        address=os.environ.get("SLURMD_NODENAME"),
    )


def restarts() -> int:
    """How often this job was requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def rendezvous_port(job: int, restart: int) -> int:
    """A port in 15000 to 29999, below those that Linux hands out; jobs side by side get different ones."""
    return 15000 + (job * 7 + restart) % 15000


def node(arguments: Sequence[str]) -> int:
    """This node's ranks. A run that ended in order is success here, so that srun kills no other node for it."""
    if arguments[0] == "doctor":
        return examine(arguments, slurm_layout())
    run = read_config(arguments).run
    code = supervise(arguments, slurm_layout(), RunFolder.at(run.dir, run.name))
    return DONE if code in (DONE, STOPPED) else code


def finish(folder: RunFolder) -> int:
    """Requeue the job where the run was stopped with a checkpoint, unless it was cancelled; the job's exit code."""
    exit_record = folder.read_exit()
    print(f"launch/slurm.sh: {describe_exit(folder)}", flush=True)
    code = FAILED if exit_record is None else int(exit_record["code"])
    return requeue(code) if code == STOPPED else code


def requeue(code: int) -> int:
    """Requeue this job, unless it was cancelled; DONE, or `code` where it is not requeued."""
    job = job_name()
    # A cancelled job is CANCELLED at once, a preempted one or one near its time limit still RUNNING.
    try:
        state = job_state(_scontrol("show", "job", job))
        if state != "RUNNING":
            print(f"launch/slurm.sh: job {job} is {state}: not requeued; the same sbatch goes on from the checkpoint")
            return code
        print(f"launch/slurm.sh: requeues job {job}; it goes on from the checkpoint", flush=True)
        _scontrol("requeue", job)
    except LaunchError as error:  # a site may forbid it
        print(f"launch/slurm.sh: {error}; the same sbatch goes on from the checkpoint", flush=True)
        return code
    return DONE


def job_warnings() -> list[str] | None:
    """What of this job's settings would cost a run steps; None outside of a job."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    try:
        shown, script = _scontrol("show", "job", job), _scontrol("write", "batch_script", job, "-")
    except LaunchError as error:
        return [f"the job's settings are not known: {error}"]
    found = []
    if "Requeue=1" not in shown:
        found.append("the job may not be requeued: it ends where it is preempted; submit with --requeue")
    if not re.search(r"^#SBATCH.*--signal", script, re.MULTILINE):
        found.append("its script asks for no signal before the time limit: add #SBATCH --signal=B:USR1@120")
    return found


def job_name() -> str:
    """This job for scontrol. The number of one job of an array may be that of the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def job_state(shown: str) -> str:
    """JobState of what `scontrol show job` prints."""
    found = re.search(r"\bJobState=(\w+)", shown)
    return found.group(1) if found else "unknown"


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(("scontrol", *arguments), capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"scontrol {' '.join(arguments)}: {error}") from None
    if done.returncode:
        raise LaunchError(f"scontrol {' '.join(arguments)}: {' '.join(done.stderr.split())}")
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """One of the three steps; its exit code."""
    step, rest = arguments[0], arguments[1:]
    try:
        if step == "prepare":
            # Requeued after a node's death, whose lock the file server keeps until its lease ends.
            patience_s = 180.0 if restarts() else 0.0
            with interruptible():
                print(prepare(rest, slurm_layout(), "launch/slurm.sh", patience_s).path)
            return DONE
        return node(rest) if step == "node" else finish(RunFolder(Path(rest[0])))
    except VitscaleError as error:
        print(redact(f"launch/slurm.sh: error: {error}"), file=sys.stderr, flush=True)
        if not error.requeues:
            return BAD_INPUT
        with contextlib.redirect_stdout(sys.stderr):  # prepare's own is the run's folder, for the shell
            return requeue(STOPPED) if step == "prepare" else STOPPED
    except KeyboardInterrupt:
        print("launch/slurm.sh: stopped before there were ranks", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            return requeue(STOPPED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
