"""What lies where in a run's folder, who holds it, and how it says that it ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from vitscale.errors import LaunchError
from vitscale.text import redact

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3  # exit codes; STOPPED is to be requeued
INTERRUPTED = 130  # ended at once by a second Ctrl-C, as a shell counts SIGINT


def _no_link(path: str, flags: int) -> int:
    """Open a file, not what a link in its place leads to: whoever can write the folder must not have others emptied."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class FolderInUse(LaunchError):
    """Another process runs in this folder."""


@dataclass(frozen=True)
class RunFolder:
    """The folder RUN_DIR/NAME of one run."""

    path: Path

    @staticmethod
    def at(run_dir: str, name: str) -> RunFolder:
        """The folder of the run that run.dir and run.name mean."""
        return RunFolder(Path(run_dir) / name)

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
    def lock(self) -> Path:
        return self.path / "lock"

    @contextlib.contextmanager
    def locked(self, shared: bool = False, patience_s: float = 0.0) -> Any:
        """Hold the folder for this process while the context lasts; the kernel lets go of it for a dead one.

        A launcher holds it `shared` for a moment, to see that no run has it; with `patience_s` it waits so
        long, since a file server keeps a dead node's lock for a while. Raises FolderInUse, naming host and
        process, where another run holds it, LaunchError where the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = open(self.lock, "a+", encoding="utf-8", opener=_no_link)  # noqa: SIM115 - closed below
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG and os.path.isdir(self.path.parent):
                raise LaunchError(f"run.name={self.path.name!r}: is too long for a folder's name; shorten it") from None
            raise LaunchError(
                f"run.dir={str(self.path.parent)!r}: cannot be written ({error}); name a folder of your own"
            ) from None
        with stream:
            deadline = time.monotonic() + patience_s
            while True:
                try:
                    self._take(stream, shared)
                    break
                except FolderInUse:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(1)
            yield

    def owner(self) -> str:
        """What the process that holds the folder, or held it last, wrote of itself; no two starts write the same."""
        return self.lock.read_text(encoding="utf-8").strip() if self.lock.exists() else "nobody"

    def _take(self, stream: IO[str], shared: bool) -> None:
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise FolderInUse(
                f"run.name={self.path.name!r}: {self.path} is in use by {holder}; wait for it, "
                f"stop it with `vitscale stop {self.path}`, or choose another run.name"
            ) from None
        except OSError as error:  # a file system without locks, say Lustre mounted without flock
            print(f"{stream.name}: cannot be locked ({error}); take care that one run uses the folder", file=sys.stderr)
        if not shared:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now().isoformat(' ')}\n")
            stream.flush()
            os.fsync(stream.fileno())  # other nodes look whether they see it too

    def clear_exit(self) -> None:
        """Take away what an earlier start said of its end."""
        self.exit.unlink(missing_ok=True)

    def clear_requests(self) -> None:
        """Take away the files that ask a run to stop or to save."""
        for path in (self.stop, self.save):
            path.unlink(missing_ok=True)

    def write_exit(self, code: int, step: int | None, reason: str) -> bool:
        """Say how the run ended, unless a rank has said so already; True when this call was the first."""
        self.path.mkdir(parents=True, exist_ok=True)  # a rank may see another folder than the one that made it
        draft = self.path / f".exit.{socket.gethostname()}.{os.getpid()}"
        draft.write_text(json.dumps({"code": code, "step": step, "reason": redact(reason)}) + "\n", encoding="utf-8")
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
        finally:
            draft.unlink()
        return True

    def read_exit(self) -> dict[str, Any] | None:
        """What `write_exit` said, or None."""
        try:
            return json.loads(self.exit.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
