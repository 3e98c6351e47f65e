"""What lies where in a run's folder, who holds it, and how it says that it ended."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.errors import LaunchError, VitscaleError, failed_storage
from vitscale.lease import FolderInUse, Lease, announce, holder, is_announced, require_free, take, withdraw
from vitscale.text import redact, to_stderr

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3  # exit codes; STOPPED is to be requeued
INTERRUPTED = 130  # ended at once by a second Ctrl-C, as a shell counts SIGINT
# How the reason begins of a run that STOPPED though nothing of the infrastructure was wrong.
STOP_REASON, ROLLED_BACK = "stopped on request", "rolled back"
STOPPED_EARLY = f"{STOP_REASON} before the first step"


def exit_code(error: Exception) -> int:
    """With what a process ends that raised this."""
    if not isinstance(error, VitscaleError):
        return FAILED
    return STOPPED if error.requeues else BAD_INPUT


@dataclass(frozen=True)
class RunFolder:
    """The folder RUN_DIR/NAME of one run, as one attempt (a start of the run) sees it."""

    path: Path
    attempt: str = ""  # of those who write how it ended, or wait for that

    @staticmethod
    def at(run_dir: str, name: str, attempt: str = "") -> RunFolder:
        """The folder of the run that run.dir and run.name mean."""
        return RunFolder(Path(run_dir) / name, attempt)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def validation(self) -> Path:
        return self.path / "validation.json"

    @property
    def baselines(self) -> Path:
        return self.path / "baselines.json"

    @property
    def shards(self) -> Path:
        return self.path / "shards.json"

    @property
    def auto(self) -> Path:
        return self.path / "auto.json"

    @property
    def rollback_record(self) -> Path:
        return self.path / "rollbacks.json"

    @property
    def diverged(self) -> Path:
        return self.path / "diverged.json"

    def rollbacks(self) -> list[dict[str, Any]]:
        """Each time that the run went back before a spike: see run/rollback.py."""
        return json.loads(self.rollback_record.read_text(encoding="utf-8")) if self.rollback_record.exists() else []

    def skipped_batches(self) -> tuple[int, ...]:
        """The global batches that these left out, ascending."""
        return tuple(sorted(batch for each in self.rollbacks() for batch in each["skipped_batches"]))

    def mlflow_run_id(self, course: int) -> Path:
        """Where the id of the run in MLflow lies; a new run, for what comes after so many rollbacks."""
        return self.path / ("mlflow_run_id" + f"_{course}" * (course > 0))

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def save(self) -> Path:
        return self.path / "save"

    @property
    def exit(self) -> Path:
        return self.path / "exit.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @contextlib.contextmanager
    def locked(self, job: str | None = None) -> Iterator[Lease]:
        """Hold the folder for this process while the context lasts; job: of the scheduler, for messages.

        Raises FolderInUse, naming host and process, where another run holds it, LaunchError where the folder cannot be
        written.
        """
        with self._writable():
            lease = take(self.path, job)
        try:
            yield lease
        finally:
            lease.release()

    def require_free(self, patience_s: float = 0.0, report: Callable[[str], None] = to_stderr) -> None:
        """Make the folder, and see that no run has it: FolderInUse where one still does after `patience_s`."""
        with self._writable():
            require_free(self.path, patience_s, report)

    def is_held(self, report: Callable[[str], None] = to_stderr) -> bool:
        """Whether a run has the folder now, or is about to; see `is_taken`."""
        return is_announced(self.path) or self.is_taken(report)

    def is_taken(self, report: Callable[[str], None] = to_stderr) -> bool:
        """Whether a run has the folder now; report: is told that another machine's run takes a while to be seen."""
        try:
            self.require_free(report=report)
        except FolderInUse:
            return True
        return False

    def announce(self) -> None:
        """A launcher is about to start a run here, whose requests count from now on."""
        announce(self.path)

    def withdraw(self) -> None:
        """What was announced has come, or will not come."""
        withdraw(self.path)

    def owner(self) -> str:
        """What the process that holds the folder, or held it last, wrote of itself; no two starts write the same."""
        return holder(self.path)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG and os.path.isdir(self.path.parent):
                raise LaunchError(f"run.name={self.path.name!r}: is too long for a folder's name; shorten it") from None
            if (failed := failed_storage(error)) is not None:
                raise failed from None
            raise LaunchError(
                f"run.dir={str(self.path.parent)!r}: cannot be written ({error}); name a folder of your own"
            ) from None

    def clear_exit(self) -> None:
        """Take away what an earlier start said of its end."""
        self.exit.unlink(missing_ok=True)

    def clear_requests(self) -> None:
        """Take away the files that ask a run to stop or to save."""
        for path in (self.stop, self.save):
            path.unlink(missing_ok=True)

    def write_exit(self, code: int, step: int | None, reason: str, replaces: bool = False) -> bool:
        """Say how the run ended, unless a rank has said so already; True when this call was the first, or `replaces`
        what was said."""
        self.path.mkdir(parents=True, exist_ok=True)  # a rank may see another folder than the one that made it
        draft = self.path / f".exit.{socket.gethostname()}.{os.getpid()}"
        record = {"code": code, "step": step, "reason": redact(reason), "attempt": self.attempt}
        try:
            draft.write_text(json.dumps(record) + "\n", encoding="utf-8")
            if replaces:
                os.replace(draft, self.exit)
                return True
            return self._publish_exit(draft)
        finally:
            draft.unlink(missing_ok=True)

    def _publish_exit(self, draft: Path) -> bool:
        try:
            os.link(draft, self.exit)  # atomic, and fails where the file is there
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: the same, but a reader may come too early
            try:
                with open(self.exit, "x", encoding="utf-8") as stream:
                    stream.write(draft.read_text(encoding="utf-8"))
            except FileExistsError:
                return False
        return True

    def read_exit(self) -> dict[str, Any] | None:
        """What `write_exit` said, of whichever attempt, or None."""
        try:
            return json.loads(self.exit.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def await_exit(self, patience_s: float) -> dict[str, Any] | None:
        """What a rank of this attempt, which has ended, said by `write_exit`; None where nothing comes for so long."""
        deadline, pause = time.monotonic() + patience_s, 0.05
        while True:
            with contextlib.suppress(OSError):  # ESTALE, say
                os.listdir(self.path)  # NFS remembers that a file was not there, until its folder is looked at anew
                record = self.read_exit()
                if record is not None and record.get("attempt") == self.attempt:
                    return record
            if time.monotonic() >= deadline:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
