"""The verb `pretrain`; and any job within its run's folder, which is held, and told how the job ended."""

from __future__ import annotations

import contextlib

from vitscale import heartbeat
from vitscale.config.check import check_config
from vitscale.config.schema import RunConfig
from vitscale.engine.failures import classified
from vitscale.engine.room import is_out_of_memory
from vitscale.errors import ConfigError, VitscaleError
from vitscale.launch import attempts
from vitscale.lease import FolderLost
from vitscale.run.job import Job
from vitscale.run.shortage import out_of_memory
from vitscale.run_folder import exit_code
from vitscale.world import World


def pretrain(config: RunConfig, world: World) -> int:
    """Train, or resume where this run stopped; the exit code (DONE or STOPPED).

    Raises VitscaleError where the user can mend the cause.
    """
    check_config(config, world)
    require_no_tuning(config)
    return run_locked(Job(config, world))


def require_no_tuning(config: RunConfig) -> None:
    """ConfigError for a key that `vitscale finetune` alone reads."""
    classification, usual = config.objective.classification, RunConfig()
    given = {
        "objective.classification.loss": (classification.loss, None),
        "objective.classification.class_weights": (classification.class_weights, None),
        "objective.classification.head_std": (classification.head_std, None),
        "optimizer.layer_decay": (config.optimizer.layer_decay, usual.optimizer.layer_decay),
        "train.freeze": (config.train.freeze, usual.train.freeze),
    }
    for key, (value, default) in given.items():
        if value != default:
            raise ConfigError(
                f"{key}={value}: is for `vitscale finetune CONFIG`, which trains from scratch too (without "
                "model.init_from); use that verb, or leave the key out"
            )


def run_locked(job: Job) -> int:
    """Run a job with its folder locked against other runs; exit.json there says how it ended."""
    folder, world = job.folder, job.world
    with contextlib.ExitStack() as stack:
        if world.is_main:
            job.lease = stack.enter_context(folder.locked(world.job))
            job.owner = folder.owner()
            folder.withdraw()
            if not world.supervised:  # else the launcher has cleared both, and what came since then counts
                folder.clear_exit()
                folder.clear_requests()
        try:
            if world.is_main:
                most = job.config.parallel.restarts_without_progress
                attempts.begin(folder, world.world_size, most, bounded=world.supervised)
            return job.run()
        except FolderLost:
            raise  # exit.json there is another run's
        except Exception as error:
            return _failed(job, error)
        finally:
            if world.is_main and not world.supervised and (exit_record := folder.read_exit()):
                with contextlib.suppress(OSError):  # as in _failed
                    attempts.end(folder, exit_record["code"], exit_record["reason"])


def _failed(job: Job, raised: Exception) -> int:
    """Say in exit.json why this rank fails, unless another one has: the first to fail says why, and it does so before
    the others can see that it is gone. Raises a VitscaleError, or our bug; the exit code where another rank's failure
    is the reason.
    """
    error = out_of_memory(raised, job) if is_out_of_memory(raised) else classified(raised, job.config)
    known, first = isinstance(error, VitscaleError), True
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    heartbeat.enter("failing")
    with contextlib.suppress(OSError):  # the storage that failed may be the folder's
        job.require_owner()
        first = job.folder.write_exit(exit_code(error), None, reason)
    if isinstance(raised, VitscaleError):
        raised.reported = not first  # by the other rank, in its words
        raise raised
    if not first and (exit_record := job.folder.read_exit()) is not None:
        return int(exit_record["code"])
    raise error from (raised if known else None)
