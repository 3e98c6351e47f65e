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

from vitscale.errors import LaunchError, VitscaleError, failed_storage
from vitscale.launch import attempts
from vitscale.launch.torchrun import (
    Layout,
    describe_exit,
    evaluate,
    examine,
    interruptible,
    prepare,
    ranks_per_node,
    read_config,
    supervise,
    whole_number,
)
from vitscale.run_folder import DONE, STOP_REASON, STOPPED, RunFolder, exit_code
from vitscale.text import redact, to_stderr, to_stdout

# What Slurm says of a job that runs, or that it ends itself: it shows its reason where the state is already COMPLETING.
_REQUEUED = ("RUNNING", "NODE_FAIL", "PREEMPTED", "TIMEOUT", "OUT_OF_MEMORY")
_SIGNAL_S = 60  # before the time limit, where --signal does not say
_LOST = ("NodeDown", "TimeLimit", "OutOfMemory")


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
        run_id=attempt(),
        is_host=os.environ.get("SLURM_NODEID", "0") == "0",
        address=os.environ.get("SLURMD_NODENAME"),
    )


def restarts() -> int:
    """How often this job was requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def attempt() -> str:
    """Which start of a run this is, the same on all nodes of the job."""
    return f"{os.environ['SLURM_JOB_ID']}.{restarts()}"


def rendezvous_port(job: int, restart: int) -> int:
    """A port in 15000 to 29999, below those that Linux hands out; jobs side by side get different ones."""
    return 15000 + (job * 7 + restart) % 15000


def node(arguments: Sequence[str]) -> int:
    """This node's ranks. A run that ended in order is success here, so that srun kills no other node for it; else it
    kills those whose ranks still wait."""
    if arguments[0] == "doctor":
        return examine(arguments, slurm_layout())
    if arguments[0] == "evaluate":
        evaluate(arguments, slurm_layout())
    run, layout = read_config(arguments).run, slurm_layout()
    folder = RunFolder.at(run.dir, run.name, attempt())
    code = supervise(arguments, layout, folder)
    in_order = code == STOPPED and (folder.read_exit() or {"reason": ""})["reason"].startswith(STOP_REASON)
    return DONE if in_order else code


def finish(folder: RunFolder) -> int:
    """Requeue the job where the run was stopped, on request or by the infrastructure; the job's exit code."""
    code = attempts.conclude(folder, attempts.ending(folder))
    to_stdout(f"launch/slurm.sh: {describe_exit(folder)}")
    return requeue(code) if code == STOPPED else code


def requeue(code: int) -> int:
    """Requeue this job, unless it was cancelled; DONE, or `code` where it is not requeued."""
    job = job_name()
    # A cancelled job is CANCELLED at once, a preempted one or one near its time limit mostly still RUNNING.
    try:
        state, reason = job_state(_scontrol("show", "job", job))
        if state not in _REQUEUED and reason not in _LOST:
            to_stdout(
                f"launch/slurm.sh: job {job} is {state}: not requeued; the same sbatch goes on from the checkpoint"
            )
            return code
        to_stdout(f"launch/slurm.sh: requeues job {job}; it goes on from the checkpoint")
        _scontrol("requeue", job)
    except LaunchError as error:  # a site may forbid it
        to_stdout(f"launch/slurm.sh: {error}; the same sbatch goes on from the checkpoint")
        return code
    return DONE


def job_warnings(notice_s: float) -> list[str] | None:
    """What of this job's settings would cost a run steps; None outside of a job. notice_s: checkpoint.notice_s."""
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
    if (wrong := _wrong_signal(script, notice_s)) is not None:
        found.append(f"{wrong}: let its script have #SBATCH --signal=B:USR1@{notice_s:.0f}")
    return found


def _wrong_signal(script: str, notice_s: float) -> str | None:
    """What is wrong with the signal that a job's script asks for before the time limit; None if nothing is."""
    asked = re.findall(r"^#SBATCH[^#\n]*?\s--signal[=\s]\s*(\S+)", script, re.MULTILINE)
    if not asked:
        return "its script asks for no signal before the time limit"
    found = re.fullmatch(r"(?:([BR]+):)?(?:SIG)?(\w+)(?:@(\d+))?", asked[-1].strip("'\""), re.IGNORECASE)
    if found is None:
        return f"--signal={asked[-1]} is none that Slurm knows"
    to, name, seconds = found[1] or "", found[2].upper(), int(found[3] or _SIGNAL_S)
    if "B" not in to.upper():
        return f"--signal={asked[-1]} goes to the steps alone, without B: not to the script, and ends torchrun"
    if name not in ("USR1", "TERM", "10", "15"):
        return f"--signal={asked[-1]} is a signal that launch/slurm.sh does not take for a wish to stop"
    if seconds < notice_s:
        return f"--signal={asked[-1]} leaves {seconds} s to save, less than checkpoint.notice_s={notice_s:g}"
    return None


def job_name() -> str:
    """This job for scontrol. The number of one job of an array may be that of the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def job_state(shown: str) -> tuple[str, str]:
    """(JobState, Reason) of what `scontrol show job` prints."""
    found = re.search(r"\bJobState=(\w+) Reason=(\w+)", shown)
    return (found[1], found[2]) if found else ("unknown", "unknown")


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(("scontrol", *arguments), capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"scontrol {' '.join(arguments)}: {error}") from None
    if done.returncode:
        raise LaunchError(f"scontrol {' '.join(arguments)}: {' '.join(done.stderr.split())}")
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """One of the three steps, or what follows where the first was ended by a signal; its exit code."""
    step, rest = arguments[0], arguments[1:]
    try:
        if step == "requeue":
            return requeue(STOPPED)
        if step == "prepare":
            # Requeued after a node's death, whose lock the file server keeps until its lease ends.
            patience_s = 180.0 if restarts() else 0.0
            with interruptible(), contextlib.redirect_stdout(sys.stderr):  # packing speaks too
                folder = prepare(rest, slurm_layout(), "launch/slurm.sh", patience_s)
            print(folder.path)
            return DONE
        return node(rest) if step == "node" else finish(RunFolder(Path(rest[0]), attempt()))
    except (VitscaleError, OSError) as raised:
        error = raised if isinstance(raised, VitscaleError) else failed_storage(raised)
        if error is None:
            raise
        to_stderr(redact(f"launch/slurm.sh: error: {error}"))
        if not error.requeues:
            return exit_code(error)
        with contextlib.redirect_stdout(sys.stderr):  # prepare's own is the run's folder, for the shell
            return requeue(STOPPED) if step == "prepare" else STOPPED
    except KeyboardInterrupt:
        to_stderr("launch/slurm.sh: stopped before there were ranks")
        with contextlib.redirect_stdout(sys.stderr):
            return requeue(STOPPED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
