"""What `vitscale checkpoint` does: list, verify, compare and delete what a run has saved."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from vitscale.checkpoint.manifest import MANIFEST, READ_ERRORS, read_manifest
from vitscale.checkpoint.retention import Retention, remove
from vitscale.checkpoint.store import (
    Checkpoint,
    SoleRank,
    checkpoint_folders,
    faults_of,
    folder_name,
    open_checkpoint,
    open_newest,
    step_of,
)
from vitscale.config.load import load_config
from vitscale.config.schema import as_dict
from vitscale.errors import CheckpointError
from vitscale.interop.deepspeed_folder import read_deepspeed
from vitscale.interop.weight_files import write_folder
from vitscale.run.saves import spared_steps
from vitscale.run_folder import RunFolder
from vitscale.text import aligned, printable, to_stderr
from vitscale.tracking.outbox import flat_params

_NAME = re.compile(r"(\.old-|bad-)?step_\d{8,}")
_UNEQUAL_ANYWAY = ("time", "elapsed_s")  # of the state, between any two checkpoints


def as_table(run: Path) -> str:
    """A row a checkpoint: step, when it was saved, size, ranks and stage, whether it is whole, why it is kept.

    Whole: the manifest is, and the files are there in their sizes; their bytes are for `verify`.
    """
    folders = _folders(run)
    reasons = _reasons(run, folders)
    rows = [["step", "saved", "GB", "ranks", "ZeRO", "state", "kept"]]
    for folder in folders:
        try:
            size = sum(path.lstat().st_size for path in folder.iterdir())
        except FileNotFoundError:  # a run that trains has deleted it
            continue
        state, faults = _state(folder), faults_of(folder, hashed=False)
        if not folder.exists():
            continue
        time = datetime.fromtimestamp(state["time"] / 1000).isoformat(" ", "minutes") if "time" in state else "?"
        of_run = [str(state.get(key, "?")) for key in ("world_size", "zero_stage")]
        why = reasons.get(folder, "until the next save")
        row = [str(step_of(folder)), time, f"{size / 1e9:.3f}", *of_run, "; ".join(faults) or "whole", why]
        rows.append([printable(cell) for cell in row])
    return aligned(rows, right=(0, 2, 3, 4))


def verify(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each checkpoint of a run, or the one that is named, and what is wrong with it; every byte is read. One that goes
    away meanwhile, since a run that trains needs it no more, is passed over."""
    for folder in [path] if _is_checkpoint(path) else _folders(path):
        faults = faults_of(folder)
        if folder.exists():
            yield folder, faults


def differences(first: Path, second: Path) -> Iterator[str]:
    """Lines for the terminal: what two checkpoints, or the newest ones of two runs, do not have in common."""
    one, two = _opened(first), _opened(second)
    yield f"{one.folder}: step {one.step}; {two.folder}: step {two.step}"
    configs = [_config(checkpoint) for checkpoint in (one, two)]
    yield from _by_key("config", *configs)
    states = [{key: value for key, value in each.state.items() if key not in _UNEQUAL_ANYWAY} for each in (one, two)]
    yield from _by_key("state", *states)
    rows, equal = [["kind", "tensor", "largest difference"]], 0
    for kind, name in sorted(one.tensors.keys() | two.tensors.keys()):
        told = _difference(one, two, kind, name)
        equal += told is None
        rows += [] if told is None else [[kind, name, told]]
    yield from [aligned([[printable(cell) for cell in row] for row in rows])] if len(rows) > 1 else []
    yield f"{equal} tensors are equal, {len(rows) - 1} differ"


def remove_steps(run: Path, steps: Sequence[int], force: bool) -> Iterator[Path]:
    """Delete these checkpoints of a run; CheckpointError, before any goes, for one that is not there, and (without
    `force`) for one that the run will ask for, and if no whole one would be left."""
    folders = _folders(run)
    by_step = {step_of(folder): folder for folder in folders}
    steps = list(dict.fromkeys(steps))
    if missing := [folder_name(step) for step in steps if step not in by_step]:
        raise CheckpointError(f"{run}: has no {', '.join(missing)}; see `vitscale checkpoint ls {run}`")
    doomed = [by_step[step] for step in steps]
    if not force:
        spared = _spared(run, folders)
        if needed := [f"{step} ({spared[step]})" for step in steps if step in spared]:
            raise CheckpointError(f"{run}: goes back to step {', '.join(needed)}; --force deletes it anyway")
        if not any(not faults_of(folder, hashed=False) for folder in folders if folder not in doomed):
            raise CheckpointError(f"{run}: no whole checkpoint would be left to go on from; --force deletes it anyway")
    for folder in doomed:
        with contextlib.suppress(FileNotFoundError):  # a run that trains has deleted it
            remove(folder)
        yield folder


def import_deepspeed(folder: Path, out: Path) -> str:
    """Write the fp32 weights of DeepSpeed's checkpoint as model.safetensors in a new folder; what to do with it."""
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        what = "not empty" if out.is_dir() else "no folder"
        raise CheckpointError(f"--out {out}: is there and {what}; name a new folder")
    tensors = read_deepspeed(folder)
    write_folder(out, {}, {name: tensor.contiguous() for name, tensor in tensors.items()})
    count = sum(tensor.numel() for tensor in tensors.values())
    return (
        f"{out}: {len(tensors)} tensors, {count:,} numbers; of a ViT: "
        f"vitscale convert {out}/model.safetensors MODEL --to vitscale, or model.init_from={out}/model.safetensors"
    )


def _folders(run: Path) -> list[Path]:
    folders = checkpoint_folders(RunFolder(run).checkpoints)
    if not folders:
        raise CheckpointError(f"{run}: has no checkpoints; name a run's folder (RUN_DIR/NAME)")
    return folders


def _reasons(run: Path, folders: Sequence[Path]) -> dict[Path, str]:
    """Why each checkpoint that stays does. folders: newest first."""
    config = RunFolder(run).config
    if not config.exists():
        return Retention(len(folders)).kept(folders, {})
    rule = load_config(config).checkpoint
    return Retention(rule.keep, rule.keep_every_hours).kept(folders, _spared(run, folders))


def _spared(run: Path, folders: Sequence[Path]) -> dict[int, str]:
    """Steps that the run may go back to, and why. folders: newest first."""
    folder, newest = RunFolder(run), _state(folders[0])
    if not folder.config.exists():
        return {}
    return spared_steps(folder, load_config(folder.config), newest.get("step", 0), newest.get("best"))


def _state(folder: Path) -> dict[str, Any]:
    try:
        return read_manifest(folder)["state"]
    except READ_ERRORS:
        return {}


def _is_checkpoint(path: Path) -> bool:
    """By its manifest, or by its name, where it has none: that is what is wrong with it."""
    return (path / MANIFEST).exists() or (path.is_dir() and _NAME.fullmatch(path.name) is not None)


def _opened(path: Path) -> Checkpoint:
    if _is_checkpoint(path):
        return open_checkpoint(path, SoleRank())
    _folders(path)
    newest = open_newest(RunFolder(path).checkpoints, SoleRank(), to_stderr)
    assert newest is not None
    return newest


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """That of the last start of the run that it lies in."""
    path = RunFolder(checkpoint.folder.absolute().parents[1]).config
    return flat_params(as_dict(load_config(path))) if path.exists() else {}


def _by_key(what: str, one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            yield printable(f"{what}: {key}: {one.get(key)}, {two.get(key)}")


def _difference(one: Checkpoint, two: Checkpoint, kind: str, name: str) -> str | None:
    """In words; None where they are the same bits."""
    shapes = [checkpoint.tensors.get((kind, name)) for checkpoint in (one, two)]
    if shapes[0] != shapes[1]:
        texts = ["not there" if each is None else f"{each[1]} {list(each[0])}" for each in shapes]
        return ", ".join(texts)
    left, right = (checkpoint.whole(kind, name) for checkpoint in (one, two))
    if left.tobytes() == right.tobytes():
        return None
    distance = np.abs(left.astype(np.float64) - right.astype(np.float64))
    return f"{np.max(distance, initial=0.0):.3g} ({np.count_nonzero(left != right):,} of {left.size:,} elements)"
