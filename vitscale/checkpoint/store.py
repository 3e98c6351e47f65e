"""Opening a checkpoint folder: `step_00001234/` with manifest.json and state-RANK.safetensors; saving.py writes them.

No pointer file: the newest folder that its own manifest proves whole is the checkpoint. The manifest holds sizes and
sha256 of the files and a digest of itself. No pickle, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vitscale.checkpoint.fragments import PieceReader, TensorRecord
from vitscale.checkpoint.manifest import MANIFEST, READ_ERRORS, read_manifest, short
from vitscale.errors import CheckpointError
from vitscale.files.store import sha256_of
from vitscale.text import listed

_FOLDER = re.compile(r"step_(\d{8,})")


class Ranks(Protocol):
    """The processes that hold one state together. The methods are collectives: all call them, in the same order."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, by rank, on every rank."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """The same on rank 0 alone, for what is large; nothing on the others."""
        ...


class SoleRank:
    """The Ranks of one process."""

    rank = 0
    world_size = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    collect = gather


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_folders(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, newest step first, whole or not."""
    steps: dict[int, Path] = {}
    # A save that replaces a folder of its own step moves it to .old-... first: should it die there, that one counts.
    for prefix in (".old-", ""):
        for path in root.glob(f"{prefix}step_*"):
            if (match := _FOLDER.fullmatch(path.name.removeprefix(prefix))) and path.is_dir():
                steps[int(match[1])] = path
    return [steps[step] for step in sorted(steps, reverse=True)]


def newest_step(root: Path) -> int:
    """Of the checkpoints under `root`, by their names; 0 without any."""
    folders = checkpoint_folders(root)
    return step_of(folders[0]) if folders else 0


def step_of(folder: Path) -> int:
    """Of a checkpoint's folder, by its name."""
    return int(folder.name.rpartition("_")[2])


class Checkpoint:
    """An opened checkpoint whose bytes were verified. Reading copies only what is asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = manifest["state"]
        self.files: dict[str, int] = {file["name"]: file["bytes"] for file in manifest["files"]}
        self._records = {(r.kind, r.name): r for r in map(TensorRecord.from_json, manifest["tensors"])}
        self._reader = PieceReader([folder / name for name in self.files])

    @property
    def tensors(self) -> dict[tuple[str, str], tuple[tuple[int, ...], np.dtype[Any]]]:
        """{(kind, name): (shape, dtype)} of all that is in it."""
        return {key: (record.shape, np.dtype(record.dtype)) for key, record in self._records.items()}

    def shapes(self, *kinds: str) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the tensors of these kinds."""
        return {name: record.shape for (kind, name), record in self._records.items() if kind in kinds}

    def read(self, kind: str, name: str, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) of the flattened tensor: 1-D, the caller's own copy."""
        return self._reader.read(self._record(kind, name), start, count)

    def whole(self, kind: str, name: str) -> np.ndarray:
        """A tensor in its shape."""
        record = self._record(kind, name)
        return self._reader.read(record, 0, record.size).reshape(record.shape)

    def check_file(self, number: int) -> None:
        """CheckpointError where the file of this place in `files` does not hold the pieces that it is to hold."""
        self._reader.check(number, self._records.values())

    def require(self, shapes: dict[str, tuple[int, ...]], *kinds: str) -> None:
        """Raise CheckpointError unless the names and shapes of these kinds together are exactly these."""
        saved = self.shapes(*kinds)
        differing = [
            f"{name} (saved {list(saved[name])}, here {list(shape)})"
            for name, shape in shapes.items()
            if name in saved and saved[name] != tuple(shape)
        ]
        groups = {
            "missing": [name for name in shapes if name not in saved],
            "not known here": [name for name in saved if name not in shapes],
            "of another shape": differing,
        }
        faults = [f"{len(names)} {what}: {listed(names)}" for what, names in groups.items() if names]
        if faults:
            raise CheckpointError(
                f"{self.folder}: its {'/'.join(kinds)} tensors are of another model: "
                f"{'; '.join(faults)}; give the model.* keys that it was made with, "
                "or another run.name"
            )

    def _record(self, kind: str, name: str) -> TensorRecord:
        if (kind, name) not in self._records:
            raise CheckpointError(f"{self.folder}: holds no {kind} named {name!r}")
        return self._records[kind, name]


def open_newest(
    root: Path, ranks: Ranks, report: Callable[[str], None], written: Collection[int] = ()
) -> Checkpoint | None:
    """The newest checkpoint under `root` that is whole, or None where there is none yet.

    A collective. A broken one is reported (by rank 0) with its reasons, and the one before it is tried. written: steps
    that this process has just saved, whose bytes it need not read again.
    Raises CheckpointError when there are checkpoints and all are broken: to start over is not ours to decide.
    """
    names = ranks.gather([path.name for path in checkpoint_folders(root)] if ranks.rank == 0 else [])[0]
    for name in names:
        folder = root / name
        checkpoint, faults = _verify(folder, ranks, hashed=not any(name == folder_name(step) for step in written))
        if checkpoint is not None:
            extra = sorted({path.name for path in folder.iterdir()} - {MANIFEST, *checkpoint.files})
            if extra and ranks.rank == 0:
                report(f"{folder}: files that its manifest does not name are not used: {listed(extra)}")
            return checkpoint
        if ranks.rank == 0:
            report(f"{folder}: is not usable ({listed(faults)}); trying the one before it")
    if names:
        raise CheckpointError(
            f"{root}: none of its {len(names)} checkpoints can be used (reasons above); "
            "restore one, or start over under another run.name"
        )
    return None


def open_checkpoint(folder: Path, ranks: Ranks, hashed: bool = True) -> Checkpoint:
    """The checkpoint in a named folder. A collective; raises CheckpointError with the reasons if it is not whole.

    hashed: whether every byte of its files is compared with what was written.
    """
    checkpoint, faults = _verify(folder, ranks, hashed)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: is not a usable checkpoint ({listed(faults)})")
    return checkpoint


def faults_of(folder: Path, hashed: bool = True) -> list[str]:
    """What is wrong with a checkpoint's folder, by one process; hashed: whether every byte of its files is read."""
    return _verify(folder, SoleRank(), hashed)[1]


def _verify(folder: Path, ranks: Ranks, hashed: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint in the folder, or what is wrong with it, the same list on every rank; they share the hashing."""
    checkpoint, digest, faults = None, None, list[str]()
    try:
        manifest = read_manifest(folder)
        digest, checkpoint = manifest["sha256"], Checkpoint(folder, manifest)
        for number in range(ranks.rank, len(manifest["files"]), ranks.world_size):
            faults += _file_faults(checkpoint, number, manifest["files"][number], hashed)
    except READ_ERRORS as error:
        faults.append(str(error))
    outcomes = ranks.gather([digest, faults])
    all_faults = list(dict.fromkeys(fault for _, faults in outcomes for fault in faults))
    if not all_faults and len({digest for digest, _ in outcomes}) > 1:
        all_faults.append(f"the ranks see different {MANIFEST} files")
    return None if all_faults else checkpoint, all_faults


def _file_faults(checkpoint: Checkpoint, number: int, file: dict[str, Any], hashed: bool) -> list[str]:
    name = file["name"]
    path = checkpoint.folder / name
    if not path.is_file():
        return [f"{name} is missing"]
    if (size := path.stat().st_size) != file["bytes"]:
        return [f"{name} has {size} bytes, {file['bytes']} were written"]
    if not hashed:
        return []
    if (digest := sha256_of(path)) != file["sha256"]:
        return [f"{name} has sha256 {short(digest)}, {short(file['sha256'])} was written: its bytes have changed"]
    try:
        checkpoint.check_file(number)
    except CheckpointError as error:
        return [str(error)]
    return []
