"""What MLflow is still to be told of a run besides its rows: a small file in the run's folder.

Written before anything is sent, so that `vitscale sync` or the next start can tell it.
"""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from typing import Any

from vitscale.files.atomic import write_atomically
from vitscale.text import redact

FILE = "mlflow_outbox.json"
STANDARD = ("config.yaml", "summary.json", "report.html", "figures")  # artifacts of every run, where they are there


class Outbox:
    """Tags, the status a run should have, and the files not yet uploaded. Any thread may call it."""

    def __init__(self, run_folder: Path, tags: dict[str, str]) -> None:
        self._folder, self._path = run_folder, run_folder / FILE
        self._lock = threading.Lock()
        saved = _read(self._path)
        self.key: str = saved.get("key") or uuid.uuid4().hex  # finds the run should its id have been lost on the way
        self.status: str = saved.get("status", "RUNNING")
        self.tags: dict[str, str] = {**saved.get("tags", {}), **tags}
        self.models: dict[str, dict[str, str]] = saved.get("models", {})  # LoggedModels: see models.py
        self._artifacts: list[str] = saved.get("artifacts", [])  # names in the run's folder

    def set_status(self, status: str) -> None:
        """The status that MLflow should show; with it go the files that every run has."""
        with self._lock:
            self.status = status
            if status != "RUNNING":
                self._add_standard()
            self._save()

    def add_standard(self) -> None:
        """The files that every run has."""
        with self._lock:
            self._add_standard()
            self._save()

    def artifacts(self) -> list[Path]:
        """What is to be uploaded."""
        with self._lock:
            return [self._folder / name for name in self._artifacts]

    def uploaded(self, path: Path) -> None:
        """Strike one off."""
        with self._lock:
            self._artifacts.remove(path.name)
            self._save()

    def set_model(self, key: str, model: dict[str, str] | None) -> None:
        """Remember a LoggedModel, or None: forget it."""
        with self._lock:
            self.models = {name: each for name, each in self.models.items() if name != key}
            if model is not None:
                self.models[key] = model
            self._save()

    def forget_models(self) -> None:
        """Another server knows none of them."""
        with self._lock:
            self.models = {}
            self._save()

    def _add_standard(self) -> None:
        there = [name for name in STANDARD if (self._folder / name).exists()]
        self._artifacts += [name for name in there if name not in self._artifacts]

    def _save(self) -> None:
        content = {"key": self.key, "status": self.status, "tags": self.tags, "artifacts": self._artifacts,
                   "models": self.models}  # fmt: skip
        write_atomically(self._path, json.dumps(content, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def flat_params(content: Any, prefix: str = "") -> dict[str, str]:
    """A nested config as {dotted key: text}; secrets in URIs are taken out."""
    if isinstance(content, dict):
        flat: dict[str, str] = {}
        for name, value in content.items():
            flat |= flat_params(value, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: redact(content if isinstance(content, str) else json.dumps(content))}
