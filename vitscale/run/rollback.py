"""What follows when a run diverges: it goes back and leaves batches out, or ends and is not started into it again."""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_right
from pathlib import Path
from typing import Any

from vitscale.checkpoint.retention import remove
from vitscale.checkpoint.store import Checkpoint, checkpoint_folders, step_of
from vitscale.config.schema import RunConfig, as_dict
from vitscale.data.derived_order import nth_left
from vitscale.engine.guard import Diverged
from vitscale.errors import CheckpointError, VitscaleError
from vitscale.files.atomic import write_atomically
from vitscale.run.auto import as_before
from vitscale.run.session import Session, Setting
from vitscale.run_folder import ROLLED_BACK, RunFolder
from vitscale.text import listed
from vitscale.tracking.outbox import flat_params

# Keys of the other sections that no number depends on: names (which a start takes from beside the shards), where bytes
# come from, how long things may take.
_AROUND = {
    "model": ("id2label",),
    "data": ("index", "threads", "prefetch", "cache", "cache_bytes", "patience_s"),
    "parallel": ("pin_cores", "timeout_s", "patience_s", "restarts_without_progress"),
}


class RolledBack(VitscaleError):
    """The run has gone back; the same command goes on from there."""

    requeues = True


def after_divergence(session: Session, shift: int, diverged: Diverged) -> Exception:
    """Roll back where guard.rollback asks for it, and say how the run ends. A collective; the same on every rank.

    shift: the state's. A later start then leaves out the batches of the steps that diverged and of the one before them,
    whose update may be the cause.
    """
    told = None
    guard = session.config.guard
    if session.world.is_main:
        if guard.rollback and len(session.folder.rollbacks()) < guard.max_rollbacks:
            told = _roll_back(session, shift // session.config.train.global_batch, diverged)
        else:
            content = {"step": diverged.last, "reason": str(diverged), "numbers": numbers_digest(session.config)}
            write_atomically(session.folder.diverged, json.dumps(content) + "\n")
    told = session.ranks.gather(told)[0]
    return diverged if told is None else RolledBack(told)


def _roll_back(session: Session, shift: int, diverged: Diverged) -> str:
    """Rank 0: what was done, in a line."""
    folder, guard = session.folder, session.config.guard
    saved = _steps(folder)
    back_to = max((step for step in saved if step <= diverged.first - guard.rollback_steps), default=0)
    first = max(diverged.first - 1, back_to + 1)
    batches = [nth_left(step - 1 + shift, session.skipped) for step in range(first, diverged.last + 1)]
    entry: dict[str, Any] = {
        "step": diverged.last,
        "reason": str(diverged),
        "back_to_step": back_to,
        "skipped_batches": batches,
        "time": int(time.time() * 1000),
    }
    # In this order: a crash in between repeats steps, and comes here again.
    for step, path in saved.items():
        if step > back_to:
            remove(path)
    write_atomically(folder.rollback_record, json.dumps([*folder.rollbacks(), entry], indent=1) + "\n")
    return (
        f"{ROLLED_BACK} to step {back_to}, and global batches {batches[0]} to {batches[-1]} are left out "
        f"({folder.rollback_record.name}); the same command goes on from there (guard.rollback, "
        f"{len(folder.rollbacks())} of guard.max_rollbacks={guard.max_rollbacks}): {diverged}"
    )


def _steps(folder: RunFolder) -> dict[int, Path]:
    """The checkpoints by their steps."""
    return {step_of(path): path for path in checkpoint_folders(folder.checkpoints)}


def refuse_the_same_end(folder: RunFolder, config: RunConfig) -> None:
    """VitscaleError where the last start diverged with these numbers; other ones free the way, for good."""
    require_another_end(folder, config)
    folder.diverged.unlink(missing_ok=True)


def require_another_end(folder: RunFolder, config: RunConfig) -> None:
    """VitscaleError where the last start diverged with these numbers."""
    if not folder.diverged.exists():
        return
    last = json.loads(folder.diverged.read_text(encoding="utf-8"))
    if last.get("numbers") != numbers_digest(as_before(config, folder)):
        return
    raise VitscaleError(
        f"run.name={config.run.name}: diverged at step {last['step']}, and would again with the same config "
        f"({last['reason']}); lower optimizer.lr, set optimizer.clip or guard.rollback=true; to try it all the same, "
        f"remove {folder.diverged}"
    )


def numbers_digest(config: RunConfig) -> str:
    """16 hex digits: a hash of the keys that the numbers of a run depend on, not where it is and what it tells."""
    kept = {path: value for path, value in flat_params(as_dict(config)).items() if _changes_numbers(path)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _changes_numbers(key: str) -> bool:
    if key in ("run.seed", "checkpoint.resume_from"):
        return True
    section, _, name = key.partition(".")
    if section in ("run", "log", "tracking", "checkpoint", "evaluation"):
        return False
    return name.partition(".")[0] not in _AROUND.get(section, ())


def kept_for_rollback(folder: RunFolder, config: RunConfig, step: int) -> list[int]:
    """Steps of checkpoints to keep: that to which a spike from `step` on leads back, and the one to be that next."""
    if not config.guard.rollback:
        return []
    saved = sorted(_steps(folder))
    count = bisect_right(saved, step - config.guard.rollback_steps)
    return saved[max(count - 1, 0) : count + 1]


def require_same_batches(session: Setting, checkpoint: Checkpoint) -> None:
    """CheckpointError unless the batches left out are those that the checkpoint's run left out, and later ones."""
    state = checkpoint.state
    saved, own = state.get("skipped_batches", []), session.skipped
    position = nth_left((state["samples"] + state.get("shift", 0)) // session.config.train.global_batch, saved)
    gone = sorted(set(saved) - set(own))
    early = sorted(batch for batch in set(own) - set(saved) if batch < position)
    if gone or early:
        raise CheckpointError(
            f"{checkpoint.folder}: was saved with the global batches {listed(saved) or 'none'} left out, and "
            f"{session.folder.rollback_record} says {listed(own) or 'none'}: samples would be repeated or skipped; "
            "bring that file back, or start another run.name with model.init_from"
        )
