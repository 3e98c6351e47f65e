"""Which of a run's checkpoints stay: the newest ones, one every so many hours, the best, those to go back to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vitscale.checkpoint.manifest import READ_ERRORS, read_manifest
from vitscale.checkpoint.store import checkpoint_folders, folder_name
from vitscale.faults import fault_point


class Retention:
    """The rule of a run, by checkpoint.keep and checkpoint.keep_every_hours."""

    def __init__(self, keep: int, keep_every_hours: float | None = None) -> None:
        self._keep, self._hours = keep, keep_every_hours
        self._trained: dict[Path, float] = {}  # seconds of training behind each checkpoint that was looked at

    def kept(self, folders: Sequence[Path], spared: Mapping[int, str]) -> dict[Path, str]:
        """Those that stay, and why. folders: newest first; spared: steps that stay whatever the rule says, and why."""
        reasons = dict.fromkeys(folders[: self._keep], f"one of the newest {self._keep}")
        passed = 0
        for folder in reversed(folders if self._hours else ()):
            # The first one of each period; it stays so whatever goes after it.
            period = int(self._seconds(folder) // (3600 * (self._hours or 1)))
            if period > passed:
                passed = period
                reasons.setdefault(folder, f"one every {self._hours:g} h")
        for step, reason in spared.items():
            for folder in folders:
                if folder.name == folder_name(step):
                    reasons.setdefault(folder, reason)
        return reasons

    def _seconds(self, folder: Path) -> float:
        if folder not in self._trained:
            self._trained[folder] = 0.0
            with contextlib.suppress(*READ_ERRORS):
                self._trained[folder] = float(read_manifest(folder)["state"].get("elapsed_s", 0.0))
        return self._trained[folder]


def retire(
    root: Path,
    step: int,
    retention: Retention,
    spared: Mapping[int, str],
    report: Callable[[str], None],
) -> None:
    """Remove the checkpoints that the one of `step` makes superfluous; failing to is reported, not fatal."""
    try:
        for old in root.glob(".old-step_*"):
            _delete(old)
        folders = checkpoint_folders(root)
        saved = folders.index(root / folder_name(step))
        for folder in folders[:saved]:
            # Of a later step, and yet the run resumed from an earlier one: it could not be read, or would be
            # the past of another run. Were it read the next time, it would undo what was done since.
            aside = folder.with_name(f"bad-{folder.name}")
            for older in root.glob("bad-step_*"):  # one is enough to look at
                with contextlib.suppress(OSError):
                    _delete(older)
            folder.rename(aside)
            report(f"{folder}: later than the step just saved, so not of this run's past; set aside as {aside.name}")
        kept = retention.kept(folders[saved:], spared)
        for folder in folders[saved:]:
            if folder not in kept:
                fault_point("save.retiring")
                remove(folder)
        fault_point("save.retired")
    except OSError as error:
        report(f"{root}: an old checkpoint could not be removed ({error}); remove it by hand")


def remove(folder: Path) -> None:
    """Delete a checkpoint; a half-deleted one is never a candidate. Of a link to one, the link alone."""
    doomed = folder.with_name(f".tmp-{folder.name}")
    if os.path.lexists(doomed):  # left by one that was broken off
        _delete(doomed)
    folder.rename(doomed)
    _delete(doomed)


def _delete(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
