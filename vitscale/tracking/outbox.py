"""What MLflow is still to be told of a run besides its rows: a small file in the run's folder.

Written before anything is sent, so that `vitscale sync` or the next start can tell it.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from pathlib import Path
from typing import Any

from vitscale.run_folder import write_atomically

FILE = "mlflow_outbox.json"
STANDARD = ("config.yaml", "summary.json", "figures")  # artifacts of every run, where they are there


class Outbox:
    """Tags, the status a run should have, and the files not yet uploaded. Any thread may call it."""

    def __init__(self, run_folder: Path, tags: dict[str, str]) -> None:
        self._folder, self._path = run_folder, run_folder / FILE
        self._lock = threading.Lock()
        saved = _read(self._path)
        self.key: str = saved.get("key") or uuid.uuid4().hex  # finds the run should its id have been lost on the way
        self.status: str = saved.get("status", "RUNNING")
        self.tags: dict[str, str] = {**saved.get("tags", {}), **tags}
        self._artifacts: list[list[str]] = saved.get("artifacts", [])

    def set_status(self, status: str) -> None:
        """The status that MLflow should show; with it go the files that every run has."""
        with self._lock:
            self.status = status
            if status != "RUNNING":
                self._add_standard()
            self._save()

    def add(self, path: Path, folder: str = "") -> None:
        """A file or folder to upload under `folder` of the run's artifacts."""
        with self._lock:
            self._add(path, folder)
            self._save()

    def add_standard(self) -> None:
        """The files that every run has."""
        with self._lock:
            self._add_standard()
            self._save()

    def artifacts(self) -> list[tuple[Path, str]]:
        """(path, folder) of what is to be uploaded."""
        with self._lock:
            return [(self._folder / path, folder) for path, folder in self._artifacts]

    def uploaded(self, path: Path, folder: str) -> None:
        """Strike one off."""
        with self._lock:
            self._artifacts.remove(self._entry(path, folder))
            self._save()

    def _add_standard(self) -> None:
        for name in STANDARD:
            if (self._folder / name).exists():
                self._add(self._folder / name, "")

    def _add(self, path: Path, folder: str) -> None:
        entry = self._entry(path, folder)
        if entry not in self._artifacts:
            self._artifacts.append(entry)

    def _entry(self, path: Path, folder: str) -> list[str]:
        """Inside the run's folder by a relative path, so that the folder may be moved."""
        path = path.absolute()
        home = self._folder.absolute()
        return [str(path.relative_to(home) if path.is_relative_to(home) else path), folder]

    def _save(self) -> None:
        content = {"key": self.key, "status": self.status, "tags": self.tags, "artifacts": self._artifacts}
        write_atomically(self._path, json.dumps(content, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def redact(text: str) -> str:
    """`text` without the user and password of any URI in it."""
    return re.sub(r"://[^/\s]+@", "://***@", text)


def flat_params(content: Any, prefix: str = "") -> dict[str, str]:
    """A nested config as {dotted key: text}; secrets in URIs are taken out."""
    if isinstance(content, dict):
        flat: dict[str, str] = {}
        for name, value in content.items():
            flat |= flat_params(value, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: redact(content if isinstance(content, str) else json.dumps(content))}
