"""Saving a checkpoint folder, there whole or not at all, while training goes on.

A snapshot lies in one memory, from which a process of each rank writes the rank's file; a thread agrees with the other
ranks' threads. The folder is written as `.tmp-step_00001234` beside its place, every file fsynced, every rank's success
agreed, the manifest last, then renamed. Waiting for the save at once makes it a synchronous one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, TypeVar

from vitscale.checkpoint.fragments import Piece, Reserve, Table, copied, file_header, join_tables
from vitscale.checkpoint.manifest import FORMAT, MANIFEST, as_text
from vitscale.checkpoint.retention import Retention, retire
from vitscale.checkpoint.store import Ranks, folder_name
from vitscale.errors import StorageError
from vitscale.faults import fault_point
from vitscale.files.atomic import flush_to_disk
from vitscale.files.shared_memory import SharedMemory
from vitscale.text import listed, to_stderr
from vitscale.world import start_helper

T = TypeVar("T")
Snapshot = Callable[[Reserve], list[Piece]]  # fills the memory that it reserves, as `fragments.arrays_in` lays it out
_AFTER_AN_ERROR_S = 20.0  # less than what torchrun leaves a rank to end
_MARGIN = 1.1  # free space that is asked for, over the bytes to write


class Saver:
    """Saves one run's checkpoints under `root`, one at a time; every rank has one. Use it in a `with`.

    It keeps the memory of one snapshot, as large as what this rank saves, from its first save on. `saved` are the steps
    of the checkpoints that it has published, `error` is why its last save failed, `failures` how many did, `seconds`
    what the last one took: all but the last the same on every rank, once none is `busy`.
    """

    def __init__(
        self,
        root: Path,
        ranks: Ranks,
        retention: Retention,
        report: Callable[[str], None] = to_stderr,
        failures: int = 0,
        limit_s: float | None = None,
    ) -> None:
        """ranks: their exchanges are made by a thread, so nobody else may use the same process group; report: is told
        by rank 0 of saves that failed, and what went wrong with old checkpoints; limit_s: in which a save is to end,
        and a rank's file to be written in half of it."""
        self.failures, self._limit_s = failures, limit_s
        self.saved: set[int] = set()
        self.error: StorageError | None = None
        self.seconds: float | None = None
        self._root, self._ranks, self._retention = root, ranks, retention
        self._report = report if ranks.rank == 0 else lambda line: None
        self._memory = SharedMemory.create("checkpoint")
        self._thread: threading.Thread | None = None
        self._target, self._began, self._doing = root, 0.0, ""  # of the save under way

    @property
    def busy(self) -> bool:
        """Whether a save is still being written, as far as this rank knows."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self,
        step: int,
        snapshot: Snapshot,
        state: dict[str, Any],
        spared: Mapping[int, str] | None = None,
        required: bool = False,
    ) -> None:
        """Save `root/step_XXXXXXXX` from a snapshot that is taken now, once the save before it has ended.

        A collective. The ranks' pieces together give each element of each tensor once (asserted). state: JSON-able,
        rank 0's is kept; spared: steps whose checkpoints stay, and why; required: whether the caller raises `error`
        itself, which else is reported. After a failure nothing is left of this checkpoint, and those before it stay.
        """
        self.wait()
        pieces = snapshot(self._memory.reserve)
        self._target, self._began, self._doing = self._root / folder_name(step), time.monotonic(), "it is begun"
        self._thread = threading.Thread(
            target=self._save, args=(step, pieces, state, spared or {}, required), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until no save is being written. StorageError as in `require_in_time`."""
        left_s = None
        if self._limit_s is not None and self._ranks.rank == 0:
            left_s = max(0.0, self._began + self._limit_s - time.monotonic())
        if self._thread is not None:
            self._thread.join(left_s)
        self.require_in_time()

    def require_in_time(self) -> None:
        """StorageError where the save under way has not ended in `limit_s`. Cheap.

        On rank 0 alone, whose folder hangs then: its file has half of that, and so have the others', who wait for it.
        """
        if self._ranks.rank == 0 and self._is_late():
            raise StorageError(
                f"{self._target}: the save has not ended in {self._limit_s:.0f} s, while {self._doing}: its storage "
                "hangs; start the run again once it answers"
            )

    def _is_late(self) -> bool:
        return self._limit_s is not None and self.busy and time.monotonic() - self._began >= self._limit_s

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # After an error a save that began before it may still succeed; where another rank is gone, it fails at once.
        # Who interrupts the process wants it to leave.
        if error is None:
            self.wait()
        elif issubclass(error, Exception) and self._thread is not None and not self._is_late():
            self._thread.join(_AFTER_AN_ERROR_S)
        if not self.busy:
            self._memory.close()

    def _save(
        self, step: int, pieces: list[Piece], state: dict[str, Any], spared: Mapping[int, str], required: bool
    ) -> None:
        """All of it, in the thread."""
        target = self._target
        temporary = self._root / f".tmp-{target.name}"
        try:
            self._write(step, target, temporary, pieces, state)
        except Exception as error:  # whatever it is, training goes on, or ends by its own failure
            reason = str(error) if isinstance(error, StorageError) else f"{target}: {_reason(error)}"
            self.error = StorageError(reason)
            self.error.__cause__ = error
            self.failures += 1
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # what cannot be removed now is swept by the next save
            if not required:
                self._report(f"{reason}; training goes on, and the next save is tried as usual")
            return
        self.error, self.seconds = None, time.monotonic() - self._began
        self.saved.add(step)
        self._doing = "old checkpoints are removed"
        if self._ranks.rank == 0:
            retire(self._root, step, self._retention, spared, self._report)

    def _write(self, step: int, target: Path, temporary: Path, pieces: list[Piece], state: dict[str, Any]) -> None:
        ranks = self._ranks
        main = ranks.rank == 0
        header, count = file_header(pieces)
        sizes = ranks.gather(len(header) + count)
        self._doing = "its folder is made"
        self._agreed(target, lambda: _prepare(self._root, temporary, sum(sizes)) if main else None)
        self._doing = "the ranks' files are written"
        files = self._agreed(target, lambda: self._write_state(temporary, header, count))
        fault_point("save.agreed")
        table = Table.of(pieces)
        digests = ranks.gather(table.digest)
        if digests.index(table.digest) < ranks.rank:
            table = replace(table, tensors=None)
        tables = [Table(*row) for row in ranks.collect(list(astuple(table)))]
        self._doing = "its manifest is written and it is given its name"
        manifest = {"format": FORMAT, "step": step, "state": state, "files": files}
        self._agreed(target, lambda: _publish(temporary, target, manifest, tables) if main else None)

    def _agreed(self, target: Path, work: Callable[[], T]) -> list[T]:
        """The JSON-able result of `work` on every rank, by rank; StorageError on all of them if it fails on one."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            failure = error
        outcomes = self._ranks.gather([_reason(failure) if failure else None, result])
        faults = [f"rank {rank}: {fault}" for rank, (fault, _) in enumerate(outcomes) if fault]
        if faults:
            raise StorageError(
                f"{target}: the checkpoint could not be written ({listed(faults)}); the ones before it are untouched"
            ) from failure
        return [value for _, value in outcomes]

    def _write_state(self, temporary: Path, header: bytes, count: int) -> dict[str, Any]:
        """Have this rank's file written; its name, size and digest."""
        path, memory = temporary / f"state-{self._ranks.rank:05d}.safetensors", self._memory.descriptor
        arguments = [str(path), str(memory), str(count), str(os.getpid())]
        process = start_helper(
            "vitscale.checkpoint.writer", arguments, [memory], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        fault_point("save.state_begun")
        limit_s = None if self._limit_s is None else self._limit_s / 2
        try:
            output, _ = process.communicate(header, timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise StorageError(f"{path} was not written in {limit_s:.0f} s: its storage hangs") from None
        if (code := process.returncode) != 0:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise StorageError(f"the process that writes {path.name} ended by {how}")
        told = json.loads(output)
        if "error" in told:
            raise StorageError(told["error"])
        fault_point("save.state_synced")
        return {"name": path.name, **told}


def save_checkpoint(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    state: dict[str, Any],
    ranks: Ranks,
    keep: int,
    report: Callable[[str], None] = to_stderr,
) -> Path:
    """Save these pieces as `root/step_XXXXXXXX`, then keep the newest `keep` checkpoints. A collective.

    See Saver.begin. Raises StorageError on every rank when any rank fails.
    """
    with Saver(root, ranks, Retention(keep), report) as saver:
        saver.begin(step, lambda reserve: copied(pieces, reserve), state, required=True)
        saver.wait()
    if saver.error is not None:
        raise saver.error
    return root / folder_name(step)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, StorageError)) else f"{type(error).__name__}: {text}"


def _prepare(root: Path, temporary: Path, needed: int) -> None:
    """Rank 0: sweep what crashes left, look for room, make the temporary folder."""
    root.mkdir(exist_ok=True)  # not its parents: a run's folder that was moved away is not to come back empty
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(root).free
    if needed * _MARGIN > free:
        raise StorageError(
            f"it needs {needed / 1e9:.3g} GB and a tenth more, and {root} has {free / 1e9:.3g} GB free: "
            "make room or lower checkpoint.keep"
        )
    temporary.mkdir()


def _publish(temporary: Path, target: Path, manifest: dict[str, Any], tables: Sequence[Table]) -> None:
    """Rank 0: the manifest, then the rename that makes the checkpoint exist."""
    manifest["tensors"] = [record.as_json() for record in join_tables(tables)]
    for file in manifest["files"]:
        path = temporary / file["name"]
        if not path.exists() or path.stat().st_size != file["bytes"]:
            raise StorageError(
                f"{path} is not as its rank wrote it; {target.parent} must lie on a file system that all nodes share"
            )
    path = temporary / MANIFEST
    path.write_text(as_text(manifest), encoding="utf-8")
    fault_point("save.manifest_written")
    flush_to_disk(path)
    flush_to_disk(temporary)
    fault_point("save.manifest_synced")
    if target.exists():  # this step again: it was found broken, or was saved before
        old = target.with_name(f".old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        fault_point("save.old_moved")
    temporary.rename(target)
    fault_point("save.renamed")
    flush_to_disk(target.parent)
    fault_point("save.root_synced")
