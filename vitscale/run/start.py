"""Where a run starts from, and what must not have changed for it to resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from vitscale.checkpoint.store import Checkpoint, open_checkpoint, open_newest
from vitscale.config.check import lanes
from vitscale.config.load import load_config
from vitscale.config.schema import RunConfig, as_dict
from vitscale.data.index import ShardIndex
from vitscale.data.mixture import is_mixture
from vitscale.engine.engine import load_weights
from vitscale.engine.loop import TrainState
from vitscale.errors import CheckpointError, ConfigError
from vitscale.files.atomic import write_atomically
from vitscale.interop.loading import start_from
from vitscale.models.auto import model_keys
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.run.rollback import require_same_batches
from vitscale.run.scoring import is_early
from vitscale.run.session import Session, Setting
from vitscale.run_folder import RunFolder
from vitscale.text import listed
from vitscale.tracking.outbox import flat_params

# With these values a manifest does not name the keys.
_USUAL: dict[str, Any] = {
    "augment.repeats": 1,
    "data.validation_fraction": 0.0,
    "data.fraction": 1.0,
    "data.train's shares": [],
    "the shards of each source": None,
}
# What of a run's state no default stands for.
_NEEDED = ("step", "samples", "adam_step", "order", "model", "total_steps", "decoder")
_OF_SHARDS = ("the index", "the shards of each source")  # what may change by data.when_changed


def find_checkpoint(session: Session) -> Checkpoint | None:
    """The checkpoint that the run goes on from: its own newest good one, else checkpoint.resume_from. A collective."""
    checkpoint = open_newest(session.folder.checkpoints, session.ranks, session.say)
    if checkpoint is None and session.config.checkpoint.resume_from:
        checkpoint = open_checkpoint(Path(session.config.checkpoint.resume_from), session.ranks)
    return checkpoint


def start(session: Session, model: ViTPreTrainedModel, checkpoint: Checkpoint | None) -> TrainState:
    """Load the weights that the run starts from into `model`: where the run then stands.

    They are the checkpoint's, else those of model.init_from; without either `model` stays as it is. A collective.
    Raises CheckpointError for a checkpoint that this run cannot resume from.
    """
    config = session.config
    if checkpoint is not None:
        session.say(f"start: {checkpoint.folder}, step {checkpoint.step} of {session.total_steps}")
        differing = require_resumable(session, checkpoint)
        _say_changes(session, checkpoint)
        load_weights(model, checkpoint)
        state = _restored(checkpoint, config)
        if differing is not None:
            _begin_epoch(session, state, differing)
        return state
    if config.model.init_from:
        report = start_from(model, config.model.init_from, session.adapts, config.model.init_take)
        session.say(f"start: weights of {config.model.init_from}")
        for what, names in (("new here", report.fresh), ("adapted", report.adapted), ("not used", report.unused)):
            session.say(f"  {what}: {listed(names) or 'nothing'}")
    else:
        session.say("start: from scratch")
    return TrainState()


def require_resumable(setting: Setting, checkpoint: Checkpoint) -> str | None:
    """CheckpointError where the run cannot go on from a whole checkpoint; which shards differ, where
    data.when_changed allows that."""
    if missing := [key for key in _NEEDED if key not in checkpoint.state]:
        raise CheckpointError(
            f"{checkpoint.folder}: says no {listed(missing)} of a run, so no run can go on from it; `vitscale export` "
            "may read its weights, for model.init_from"
        )
    differing = _require_same_order(setting, checkpoint)
    _require_same_model(setting, checkpoint)
    require_same_batches(setting, checkpoint)
    return differing


def _restored(checkpoint: Checkpoint, config: RunConfig) -> TrainState:
    """Where the run stood; what an older version did not save is at its default."""
    names = [item.name for item in fields(TrainState) if item.name in checkpoint.state]
    state = TrainState(**{name: checkpoint.state[name] for name in names})
    state.early_stopped = is_early(state, config)
    return state


def order_keys(session: Setting) -> dict[str, Any]:
    """What decides the order of samples, as a checkpoint's manifest keeps it."""
    config = session.config
    sources = config.data.train if is_mixture(config.data.train) else ()
    keys = {
        "run.seed": config.run.seed,
        "train.global_batch": config.train.global_batch,
        "data.lanes": lanes(config),
        "data.window": config.data.window,
        "the index": session.index.digest,
    }
    optional = {
        "augment.repeats": config.augment.repeats,
        "data.validation_fraction": config.data.validation_fraction,
        "data.fraction": config.data.fraction,
        "data.train's shares": [[source.weight, source.repeat] for source in sources],
        "the shards of each source": list(session.index.sources) if sources else None,
    }
    return keys | {name: value for name, value in optional.items() if value != _USUAL[name]}


def _require_same_order(session: Setting, checkpoint: Checkpoint) -> str | None:
    """CheckpointError where the order is another one; which shards differ, where data.when_changed allows that."""
    saved = checkpoint.state["order"]
    own = order_keys(session)
    for name in own | saved:
        value, before = own.get(name, _USUAL.get(name)), saved.get(name, _USUAL.get(name))
        if before != value and name not in _OF_SHARDS:
            raise CheckpointError(
                f"{checkpoint.folder}: was saved with {name}={before}, this run has {value}: samples would be "
                "repeated or skipped; set it back, or start another run.name with model.init_from"
            )
    if all(saved.get(name) == own.get(name) for name in _OF_SHARDS):
        return None
    differing = _differing_shards(session, saved["the index"])
    if session.config.data.when_changed == "new_epoch":
        return differing
    raise CheckpointError(
        f"{checkpoint.folder}: was saved with other shards ({differing}): samples would be repeated or skipped; set "
        "data.train back to those of this run, go on with these from a new epoch by data.when_changed=new_epoch, or "
        "train on these by another run.name with model.init_from"
    )


def _begin_epoch(session: Session, state: TrainState, differing: str) -> None:
    """Go on with other shards: from the next step on in their own order, from the start of the first epoch that no step
    has been in. Its number is new, so that what is drawn by (epoch, sample) is drawn for the first time too."""
    epoch = state.epoch + 1
    first = epoch * session.order.batches_per_epoch
    first -= sum(batch < first for batch in session.skipped)  # positions count what is left
    state.shift = first * session.config.train.global_batch - state.samples
    session.say(
        f"shards: {differing}; from step {state.step + 1} on these are read, from the start of epoch {epoch}: samples "
        f"that epoch {state.epoch} had not come to are left out of it"
    )


def keep_shards(session: Session) -> None:
    """Write which shards the run has, so that a later start with others can say which differ."""
    rows = [list(row) for row in _shards(session.index)]
    content = {"digest": session.index.digest, "shards": rows}
    if not session.folder.shards.exists() or read_shards(session.folder) != content:
        write_atomically(session.folder.shards, json.dumps(content) + "\n")


def read_shards(folder: RunFolder) -> dict[str, Any]:
    """What `keep_shards` wrote; empty if nothing did."""
    try:
        return json.loads(folder.shards.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _shards(index: ShardIndex) -> Iterator[tuple[str, int, int]]:
    """Name, samples and bytes of each shard: what its digest is of."""
    return zip(index.names, index.samples.tolist(), index.bytes.tolist(), strict=True)


def _differing_shards(session: Setting, digest: str) -> str:
    """How the shards differ from those of a digest, by name where they are those of the run's last start."""
    kept = read_shards(session.folder)
    if kept.get("digest") != digest:
        return f"the index {digest[:12]}, here {session.index.digest[:12]}"
    before = {name: (samples, size) for name, samples, size in kept["shards"]}
    now = {name: (samples, size) for name, samples, size in _shards(session.index)}
    kinds = {
        "new": now.keys() - before.keys(),
        "gone": before.keys() - now.keys(),
        "changed": {name for name in now.keys() & before.keys() if now[name] != before[name]},
    }
    differing = "; ".join(f"{len(names)} {kind}: {listed(sorted(names), 3)}" for kind, names in kinds.items() if names)
    return differing or "the same ones in another order"


def _require_same_model(session: Setting, checkpoint: Checkpoint) -> None:
    saved, here = checkpoint.state["model"], model_keys(session.config)
    differing = [
        f"{key} (saved {saved.get(key)}, here {here.get(key)})"
        for key in sorted(here.keys() | saved.keys())
        if saved.get(key) != here.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.folder}: is of another model: {', '.join(differing)}; set them back, "
            "or start another run.name"
        )


def _say_changes(session: Session, checkpoint: Checkpoint) -> None:
    saved, total, decoder = checkpoint.state, session.total_steps, session.decoder
    if saved["total_steps"] != total:  # also where other data made the epochs longer
        session.say(f"steps: {saved['total_steps']} before, {total} now; lr follows the new total")
    if saved["decoder"] != decoder:
        session.say(f"decoder: {saved['decoder']} before, {decoder} now; pixels may differ in their last bits")


def say_changed_keys(session: Session) -> None:
    """Print the config keys that differ from those of the run's last start."""
    path = session.folder.config
    if not session.world.is_main or not path.exists():
        return
    try:
        last = load_config(path)
    except ConfigError as error:  # written by another version: reported, but no reason to stop
        session.say(f"config: the one of the last start cannot be compared: {error}")
        return
    before, now = flat_params(as_dict(last)), flat_params(as_dict(session.config))
    for key, value in now.items():
        if before.get(key) != value and key not in ("train.steps", "train.epochs"):  # reported as the new total
            session.say(f"config: {key} was {before.get(key)}, is {value}")
