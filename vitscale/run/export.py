"""A run's checkpoint as a model folder that transformers opens."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from vitscale.checkpoint.manifest import MANIFEST
from vitscale.checkpoint.store import SoleRank, folder_name, open_checkpoint, open_newest
from vitscale.config.load import load_config
from vitscale.errors import CheckpointError
from vitscale.interop.pretrained import save_run_model
from vitscale.run_folder import RunFolder
from vitscale.text import to_stderr


def export_run(source: Path, out: Path | None = None, written: Collection[int] = ()) -> Path:
    """A run's best or else newest good checkpoint (or a checkpoint folder) as a model folder; default: its model/.

    Of trained weights it takes the moving average (train.ema_decay) where the checkpoint has one. On the
    CPU, from the pieces, without the world that made them. written: see open_newest.
    """
    source = source.resolve()
    folder = RunFolder(source)
    if not folder.checkpoints.is_dir() and not (source / MANIFEST).is_file():
        raise CheckpointError(
            f"{source}: {'holds no checkpoint' if source.is_dir() else 'no such folder'}; name a run's folder or a "
            "checkpoint in it, or for a model add --format onnx, --format torch-export or --prune"
        )
    if folder.checkpoints.is_dir():
        checkpoint = open_newest(folder.checkpoints, SoleRank(), print, written)
        best = checkpoint.state.get("best") if checkpoint is not None else None
        if best is not None:  # of train.keep_best
            path, hashed = folder.checkpoints / folder_name(best["step"]), best["step"] not in written
            if path.is_dir():
                checkpoint = open_checkpoint(path, SoleRank(), hashed)
            else:  # somebody has deleted it: a run that has trained to its end is not to fail for that
                to_stderr(f"warning: {path}, the best one, is not there; the newest is exported in its place")
    else:
        folder = RunFolder(source.parent.parent)
        checkpoint = open_checkpoint(source, SoleRank())
    if checkpoint is None or not folder.config.exists():
        raise CheckpointError(f"{source}: no run folder with a checkpoint, nor a checkpoint inside one")
    config = load_config(folder.config)
    trained = "ema" if checkpoint.shapes("ema") else "param"
    state = {name: checkpoint.whole(kind, name) for kind in (trained, "frozen") for name in checkpoint.shapes(kind)}
    out = out or folder.model
    save_run_model(out, config, state)
    return out
