"""A checkpoint folder, there whole or not at all: `step_00001234/` with manifest.json and state-RANK.safetensors.

Written as `.tmp-step_00001234` beside its place, every file fsynced, every rank's success agreed, the
manifest last, then renamed. No pointer file: the newest folder that its own manifest proves whole is the
checkpoint. The manifest holds sizes and sha256 of the files and a digest of itself. No pickle, no torch.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from vitscale.checkpoint.fragments import Piece, PieceReader, TensorRecord, join_tables, table, write_pieces
from vitscale.checkpoint.manifest import FORMAT, MANIFEST, READ_ERRORS, as_text, read_manifest, short
from vitscale.errors import CheckpointError
from vitscale.files.atomic import flush_to_disk
from vitscale.files.store import sha256_of
from vitscale.text import listed, to_stderr

_FOLDER = re.compile(r"step_(\d{8,})")
_STATE_FILE = re.compile(r"state-\d{5,}\.safetensors")

T = TypeVar("T")


def _pass(point: str) -> None:
    """Nothing: outside of tests no one looks on."""


# Called with a point's name as a save gets there, so that a test can end the process at each of them.
POINTS = (
    "state_begun",
    "state_written",
    "state_synced",
    "agreed",
    "manifest_written",
    "manifest_synced",
    "old_moved",
    "renamed",
    "root_synced",
    "retiring",
    "retired",
)
on_progress: Callable[[str], None] = _pass


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


# ---- saving


def save_checkpoint(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    state: dict[str, Any],
    ranks: Ranks,
    keep: int,
    report: Callable[[str], None] = to_stderr,
    kept_step: int | None = None,
) -> Path:
    """Save what the ranks hold as `root/step_XXXXXXXX`, then keep the newest `keep` checkpoints, and that of kept_step.

    A collective. `pieces`: this rank's; together they give each element of each tensor once (asserted).
    `state`: JSON-able, rank 0's is kept. Raises CheckpointError on every rank when any rank fails; nothing is
    left of this checkpoint then, and those before it stay. `report` is told by rank 0 what went wrong with old ones.
    """
    target = root / folder_name(step)
    temporary = root / f".tmp-{target.name}"
    held: list[Piece] = []
    try:
        sizes = _agreed(ranks, target, lambda: _collect(pieces, held))
        _agreed(ranks, target, lambda: _prepare(root, temporary, sum(sizes)) if ranks.rank == 0 else None)
        written = _agreed(ranks, target, lambda: _write_state(temporary, ranks.rank, held))
        on_progress("agreed")
        tables = ranks.collect(table(held))
        manifest = {"format": FORMAT, "step": step, "state": state, "files": written}
        _agreed(ranks, target, lambda: _publish(temporary, target, manifest, tables) if ranks.rank == 0 else None)
    except Exception:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # what cannot be removed now is swept by the next save
        raise
    if ranks.rank == 0:
        _retire(root, step, keep, report, kept_step)
    return target


def _agreed(ranks: Ranks, target: Path, work: Callable[[], T]) -> list[T]:
    """The JSON-able result of `work` on every rank, by rank; CheckpointError on all of them if it fails on one."""
    result: Any = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        failure = error
    outcomes = ranks.gather([_reason(failure) if failure else None, result])
    faults = [f"rank {rank}: {fault}" for rank, (fault, _) in enumerate(outcomes) if fault]
    if faults:
        raise CheckpointError(
            f"{target}: the checkpoint could not be written ({listed(faults)}); the ones before it are untouched"
        ) from failure
    return [value for _, value in outcomes]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, CheckpointError)) else f"{type(error).__name__}: {text}"


def _collect(pieces: Iterable[Piece], held: list[Piece]) -> int:
    """Fill `held` with this rank's pieces; how many bytes they are."""
    held.extend(pieces)
    return sum(piece.values.nbytes for piece in held)


def _prepare(root: Path, temporary: Path, needed: int) -> None:
    """Rank 0: sweep what crashes left, look for room, make the temporary folder."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise CheckpointError(
            f"it needs {needed / 1e9:.2f} GB and {root} has {free / 1e9:.2f} GB free: "
            "make room or lower checkpoint.keep"
        )
    temporary.mkdir()


def _write_state(temporary: Path, rank: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write this rank's file; tells its name, size and digest."""
    path = temporary / f"state-{rank:05d}.safetensors"
    on_progress("state_begun")
    write_pieces(path, pieces)
    on_progress("state_written")
    flush_to_disk(path)
    on_progress("state_synced")
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _publish(temporary: Path, target: Path, manifest: dict[str, Any], tables: Sequence[list[list[Any]]]) -> None:
    """Rank 0: the manifest, then the rename that makes the checkpoint exist."""
    manifest["tensors"] = [record.as_json() for record in join_tables(tables)]
    for file in manifest["files"]:
        path = temporary / file["name"]
        if not path.exists() or path.stat().st_size != file["bytes"]:
            raise CheckpointError(
                f"{path} is not as its rank wrote it; {target.parent} must lie on a file system that all nodes share"
            )
    path = temporary / MANIFEST
    path.write_text(as_text(manifest), encoding="utf-8")
    on_progress("manifest_written")
    flush_to_disk(path)
    flush_to_disk(temporary)
    on_progress("manifest_synced")
    if target.exists():  # this step again: it was found broken, or was saved before
        old = target.with_name(f".old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        on_progress("old_moved")
    temporary.rename(target)
    on_progress("renamed")
    flush_to_disk(target.parent)
    on_progress("root_synced")


def _retire(root: Path, step: int, keep: int, report: Callable[[str], None], kept_step: int | None) -> None:
    """Rank 0: remove checkpoints that the one of `step` makes superfluous; failing to is reported, not fatal."""
    try:
        for old in root.glob(".old-step_*"):
            shutil.rmtree(old)
        folders = checkpoint_folders(root)
        saved = folders.index(root / folder_name(step))
        for folder in folders[:saved]:
            # Of a later step, and yet the run resumed from an earlier one: it could not be read, or would be
            # the past of another run. Were it read the next time, it would undo what was done since.
            aside = folder.with_name(f"bad-{folder.name}")
            for older in root.glob("bad-step_*"):  # one is enough to look at
                shutil.rmtree(older, ignore_errors=True)
            folder.rename(aside)
            report(f"{folder}: later than the step just saved, so not of this run's past; set aside as {aside.name}")
        spared = None if kept_step is None else root / folder_name(kept_step)
        for folder in folders[saved + keep :]:
            if folder == spared:
                continue
            doomed = folder.with_name(f".tmp-{folder.name}")  # so that a half-deleted folder is never a candidate
            folder.rename(doomed)
            on_progress("retiring")
            shutil.rmtree(doomed)
        on_progress("retired")
    except OSError as error:
        report(f"{root}: an old checkpoint could not be removed ({error}); remove it by hand")


# ---- opening


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


def open_newest(root: Path, ranks: Ranks, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint under `root` that is whole, or None where there is none yet.

    A collective. A broken one is reported (by rank 0) with its reasons, and the one before it is tried.
    Raises CheckpointError when there are checkpoints and all are broken: to start over is not ours to decide.
    """
    names = ranks.gather([path.name for path in checkpoint_folders(root)] if ranks.rank == 0 else [])[0]
    for name in names:
        folder = root / name
        manifest, faults = _verify(folder, ranks)
        if not faults:
            checkpoint = Checkpoint(folder, manifest)
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


def open_checkpoint(folder: Path, ranks: Ranks) -> Checkpoint:
    """The checkpoint in a named folder. A collective; raises CheckpointError with the reasons if it is not whole."""
    manifest, faults = _verify(folder, ranks)
    if faults:
        raise CheckpointError(f"{folder}: is not a usable checkpoint ({listed(faults)})")
    return Checkpoint(folder, manifest)


def _verify(folder: Path, ranks: Ranks) -> tuple[dict[str, Any], list[str]]:
    """The manifest and what is wrong with the folder, the same list on every rank; the ranks share the hashing."""
    manifest: dict[str, Any] = {}
    faults = []
    try:
        manifest = read_manifest(folder)
        for file in manifest["files"][ranks.rank :: ranks.world_size]:
            faults += _file_faults(folder, file)
    except READ_ERRORS as error:
        faults.append(str(error))
    outcomes = ranks.gather([manifest.get("sha256"), faults])
    all_faults = list(dict.fromkeys(fault for _, faults in outcomes for fault in faults))
    if not all_faults and len({digest for digest, _ in outcomes}) > 1:
        all_faults.append(f"the ranks see different {MANIFEST} files")
    return manifest, all_faults


def _file_faults(folder: Path, file: dict[str, Any]) -> list[str]:
    name = file["name"]
    if not _STATE_FILE.fullmatch(name):  # also keeps a forged manifest from naming a path elsewhere
        return [f"{name!r} is no name of a state file"]
    path = folder / name
    if not path.is_file():
        return [f"{name} is missing"]
    if (size := path.stat().st_size) != file["bytes"]:
        return [f"{name} has {size} bytes, {file['bytes']} were written"]
    if (digest := sha256_of(path)) != file["sha256"]:
        return [f"{name} has sha256 {short(digest)}, {short(file['sha256'])} was written: its bytes have changed"]
    return []
