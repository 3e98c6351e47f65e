"""A start up to its first step, as rank 0 makes it alone, with nothing written: what would end it is raised.

The checks are those of a start; a run that `rehearse` lets pass can still be ended by what ranks find together.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitscale.checkpoint.store import Checkpoint, SoleRank, checkpoint_folders, open_checkpoint, open_newest, step_of
from vitscale.config.schema import Data, RunConfig
from vitscale.data.index import ShardIndex
from vitscale.data.labels import LabelReader, count_labels
from vitscale.files.stores import Stores
from vitscale.interop.loading import start_from
from vitscale.models.auto import new_model
from vitscale.run.finetune import Finetune, require_readable
from vitscale.run.job import Job
from vitscale.run.pretrain import require_no_tuning
from vitscale.run.rollback import require_another_end
from vitscale.run.session import look_at_others
from vitscale.run.start import require_resumable
from vitscale.run.training_data import named_classes, order_over, training_index
from vitscale.run_folder import RunFolder
from vitscale.world import World

_LABELS = 5_000_000  # of more, the first bad ones are found by the run


class _Unwritten(Stores):
    """What reads the shards, and leaves nothing beside them."""

    def write(self, path: str, data: bytes) -> None:
        raise PermissionError(errno.EACCES, "nothing is written here", path)


@dataclass(frozen=True)
class _Setting:
    config: RunConfig
    folder: RunFolder
    index: ShardIndex
    skipped: tuple[int, ...]


def job_of(config: RunConfig, world: World, finetunes: bool) -> Job:
    """The job that a start would run. ConfigError for keys that are another verb's."""
    if finetunes:
        return Finetune(config, world)
    require_no_tuning(config)
    return Job(config, world)


def rehearse(job: Job, report: Callable[[str], None]) -> str:
    """From where the run would start, in words; VitscaleError where it could not. report: is told of checkpoints that
    are broken. The shards are to be counted already, or few."""
    config, folder = job.config, job.folder
    require_another_end(folder, config)
    with tempfile.TemporaryDirectory() as scratch:
        # With the tables that a run has kept of shards beside which nothing can be written.
        kept = folder if folder.path.is_dir() else RunFolder(Path(scratch))
        index = training_index(config, kept, _store_of(config.data))
        others = look_at_others(config, kept, index, job.look_at_data)
        config = named_classes(config, index.class_names) if config.objective.needs_labels else config
        training = others.sides and others.sides[0]
        order = order_over(config, index, training, others.skipped)
        if config.objective.needs_labels and others.facts is None and index.total <= _LABELS:
            counts = count_labels(index, config.data.label_extension, LabelReader.of(config), training)
            require_readable(config, counts)
    checkpoint = _checkpoint(config, folder, report)
    if checkpoint is not None:
        require_resumable(_Setting(config, folder, index, others.skipped), checkpoint)
        return f"goes on from {checkpoint.folder}"
    if config.model.init_from:
        start_from(new_model(config, config.run.seed, drawn=False), config.model.init_from, job.adapts,
                   config.model.init_take)  # fmt: skip
        return f"starts from the weights of {config.model.init_from}, {order.batches_per_epoch:,} steps an epoch"
    return f"starts from scratch, {order.batches_per_epoch:,} steps an epoch"


def _store_of(data: Data) -> Stores:
    return _Unwritten(data.cache, data.cache_bytes, data.patience_s)


def _checkpoint(config: RunConfig, folder: RunFolder, report: Callable[[str], None]) -> Checkpoint | None:
    """That from which the run would go on; its bytes are for `vitscale checkpoint verify`."""
    steps = [step_of(path) for path in checkpoint_folders(folder.checkpoints)]
    checkpoint = open_newest(folder.checkpoints, SoleRank(), report, written=steps)
    if checkpoint is None and config.checkpoint.resume_from:
        checkpoint = open_checkpoint(Path(config.checkpoint.resume_from), SoleRank(), hashed=False)
    return checkpoint
