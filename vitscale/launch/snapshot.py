"""What was started, kept in the run's folder without secrets: command, config as given, code version, Slurm's script.

One folder a start, RUN/launch/DATE-TIME[-JOB]; the resolved config is the run's own config.yaml.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml

from vitscale import __version__
from vitscale.run_folder import RunFolder
from vitscale.text import redact

_VARIABLES = (
    *("CONFIG", "DATA", "NPROC_PER_NODE", "NNODES", "RDZV_ENDPOINT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("RESTARTS", "VITSCALE_HOME", "VITSCALE_VENV", "VITSCALE_SITE_ENV"),
    *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST"),
)


def keep_snapshot(folder: RunFolder, config: Path, command: Sequence[str]) -> Path:
    """Write the snapshot of one start; its folder."""
    now, job = datetime.now(UTC), os.environ.get("SLURM_JOB_ID")
    kept = folder.path / "launch" / (now.strftime("%Y%m%d-%H%M%S") + (f"-job{job}" if job else ""))
    kept.mkdir(parents=True, exist_ok=True)
    lines = [shlex.join(command), f"# {now.isoformat(timespec='seconds')} on {socket.gethostname()} in {Path.cwd()}"]
    lines += [f"{name}={shlex.quote(os.environ[name])}" for name in _VARIABLES if name in os.environ]
    (kept / "command.txt").write_text(redact("\n".join(lines)) + "\n", encoding="utf-8")
    for depth, source in enumerate(_with_parents(config)):
        name = "config.yaml" if depth == 0 else f"config.extends-{depth}.yaml"
        (kept / name).write_text(redact(source.read_text(encoding="utf-8")), encoding="utf-8")
    (kept / "code.txt").write_text(code_version(), encoding="utf-8")
    if job:
        (kept / "job.txt").write_text(redact(_output("scontrol", "show", "job", job)), encoding="utf-8")
        if script := _output("scontrol", "write", "batch_script", job, "-"):
            (kept / "slurm.sh").write_text(redact(script), encoding="utf-8")
    return kept


def _with_parents(config: Path) -> Iterator[Path]:
    """A config file that loads, then the file it extends, and so on."""
    yield config
    parent = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("extends")
    if parent is not None:
        yield from _with_parents(config.parent / parent)


def commit() -> str:
    """The commit of this checkout, or nothing where it is none."""
    return _git("rev-parse", "HEAD").strip()


def code_version() -> str:
    """Version, commit and what differs from it."""
    if not (head := commit()):
        return f"vitscale {__version__}, not in a git checkout\n"
    changed = _git("status", "--short") + _git("diff", "--stat", "HEAD")
    return f"vitscale {__version__}, commit {head}\n{changed or 'no change since that commit'}\n"


def _git(*arguments: str) -> str:
    """What git says of the checkout that this file lies in."""
    return _output("git", "-C", str(Path(__file__).resolve().parents[2]), *arguments)


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing, fails or is slow: a record must not stop a run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
