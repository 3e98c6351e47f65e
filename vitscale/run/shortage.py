"""What follows when a rank runs out of memory: whose fault it is, what would fit, what the next start chooses."""

from __future__ import annotations

import traceback

import torch

from vitscale.config.schema import AUTO, RunConfig
from vitscale.config.step import auto_keys, step_keys, with_step
from vitscale.engine.failures import classified
from vitscale.engine.room import give_back, has_own_limit, is_out_of_gpu_memory, lack, room
from vitscale.errors import ConfigError, InfrastructureError, VitscaleError
from vitscale.planning.plan import Cluster, Planner, advice
from vitscale.run.auto import ran_out
from vitscale.run.job import Job
from vitscale.text import byte_size, to_stderr


class TooMuchChosen(VitscaleError):
    """What auto came to has run out of memory; the same command chooses less."""

    requeues = True


def out_of_memory(raised: Exception, job: Job) -> Exception:
    """With what a rank ends that ran out of memory. It asks for another start where that may have enough: where auto
    chooses less, or where by the plan there was enough on the machine, so that others took it."""
    error = classified(raised, job.config)
    try:
        traceback.clear_frames(raised.__traceback__)  # of the step's tensors: what follows takes memory too
        return _explained(raised, error, job)
    except Exception as failed:  # whatever it is: the error itself must be told
        to_stderr(f"no advice: {failed}")
        return error


def _explained(raised: Exception, error: Exception, job: Job) -> Exception:
    config, world = job.config, job.world
    on_gpu, of_gpu = world.device == "cuda", is_out_of_gpu_memory(raised)
    if on_gpu and not of_gpu:  # of the plan's figures none is of the machine's memory
        return error
    if job.room is None or auto_keys(config):  # nothing of the run was made yet
        if has_own_limit():
            return ConfigError(f"a limit of address space (ulimit -v) is too low to start a run ({lack(raised)})")
        return error
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    give_back(device)
    there = room(world, device) if on_gpu else job.room
    ratio = ran_out(job.folder, config) if job.chosen else 1.0
    cluster = Cluster.of(world, there.bytes)
    planner = Planner(config, cluster)
    needed = planner.estimate(config, ratio).memory.total_bytes
    share = f"by the plan it takes {byte_size(needed)} of {byte_size(there.bytes)} {there.source}"
    if job.chosen and Planner(_left_to_auto(config, job.chosen), cluster).choice(ratio, failed=config) is not None:
        keys = " ".join(f"{key}={step_keys(config)[key]}" for key in job.chosen)
        return TooMuchChosen(f"{keys}, by auto, ran out of memory ({lack(raised)}); the same command now chooses less")
    ways = advice(config, world, min(there.bytes, needed - 1), ratio)
    if of_gpu:
        return ConfigError(f"{error}; {share}; {ways}")
    if has_own_limit() or needed > there.bytes:
        more = "raise the limit" if has_own_limit() else "give it more"
        return ConfigError(
            f"train.micro_batch={config.train.micro_batch}: ran out of memory ({lack(raised)}); {share}; lower it, "
            f"which leaves the numbers as they are, or {more}; {ways}"
        )
    return InfrastructureError(f"{error}; {share}; {ways}")


def _left_to_auto(config: RunConfig, keys: list[str]) -> RunConfig:
    """The config with these keys as they were written."""
    return with_step(config, *(AUTO if key in keys else value for key, value in step_keys(config).items()))
