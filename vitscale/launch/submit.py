"""`vitscale submit`: a config is looked at for the GPUs that a job is to have, before it waits in a queue for them."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import vitscale
from vitscale.config.check import check_config
from vitscale.config.load import load_config
from vitscale.errors import ConfigError, LaunchError
from vitscale.world import World

ROOT = Path(vitscale.__file__).resolve().parents[1]
SCRIPT = ROOT / "slurm" / "pretrain_vit_h.sh"  # which trains what CONFIG names
_OURS = ("--nodes", "-N", "--gpus-per-node", "--job-name", "-J")


def submit(
    config: Path, overrides: Sequence[str], nodes: int, gpus_a_node: int, options: Sequence[str], dry_run: bool
) -> str:
    """Give slurm/pretrain_vit_h.sh to sbatch; its answer, or with dry_run the command that would be run.

    options: sbatch's, as they stand. Raises ConfigError where the config cannot run on so many GPUs, or an option is
    given elsewhere, LaunchError where there is no sbatch, or it refuses.
    """
    read = load_config(config, overrides)
    check_config(read, World(world_size=nodes * gpus_a_node, local_world_size=gpus_a_node, device="cuda"))
    if not read.data.train:
        raise ConfigError("data.train: names no shards; add data.train='/shards/train-{000000..001023}.tar'")
    for option in options:
        if not option.startswith("-") or option.startswith(_OURS):
            rule = f"must be one of sbatch's options, and not {', '.join(_OURS)}, as --option=--partition=gpu"
            raise ConfigError(f"--option {option!r}: {rule}")
    if not SCRIPT.is_file():
        raise LaunchError(f"{SCRIPT}: is not there: `vitscale submit` runs from the repository, which has slurm/")
    variables = {"VITSCALE_HOME": str(ROOT), "CONFIG": str(config.absolute())}
    command = ["sbatch", f"--nodes={nodes}", f"--gpus-per-node={gpus_a_node}", f"--job-name={read.run.name}", *options]
    command += [str(SCRIPT), *overrides]
    if dry_run:
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)])
    try:
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError("sbatch: is not on the PATH; submit on a login node of the cluster, or --dry-run") from None
    if done.returncode:
        raise LaunchError(f"sbatch: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
