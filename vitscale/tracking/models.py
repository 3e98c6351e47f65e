"""MLflow's LoggedModels of a run: each checkpoint that is kept, with its row's metrics, and the trained model."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vitscale
from vitscale.tracking.outbox import Outbox

_CHECKPOINT = re.compile(r"step_(\d+)")
_TRAINED = "trained"  # the key, beside steps, of the model that the run left
_LOADER = "vitscale.inference.pyfunc"


class LoggedModels:
    """What MLflow holds of a run's models; `send` brings it up to what lies in the run's folder."""

    def __init__(self, run_folder: Path, run_name: str, uploads: bool, outbox: Outbox) -> None:
        """uploads: whether the trained model's files go to MLflow."""
        self._folder, self._name, self._uploads, self._outbox = run_folder, run_name, uploads, outbox

    @property
    def upload_bytes(self) -> int:
        """How much is to be uploaded once the run has ended."""
        if not self._uploads or self._outbox.models.get(_TRAINED, {}).get("digest") == self._digest():
            return 0
        return sum(path.stat().st_size for path in self._files())

    def send(self, client: Any, experiment_id: str, run_id: str, rows: Mapping[int, Mapping[str, float]]) -> None:
        """rows: metrics by step, as far as they are remembered."""
        there = {int(match[1]): path.parent for path in (self._folder / "checkpoints").glob("step_*/manifest.json")
                 if (match := _CHECKPOINT.fullmatch(path.parent.name))}  # fmt: skip
        known = {key: each for key, each in self._outbox.models.items() if key != _TRAINED}
        for key in known.keys() - {str(step) for step in there}:
            self._delete(client, key)
        for step in sorted(there.keys() - {int(key) for key in known}):
            tags = {"vitscale.step": str(step), "vitscale.checkpoint": str(there[step].resolve())}
            model = client.create_logged_model(
                experiment_id, f"{self._name}-step-{step}", run_id, tags=tags, model_type="checkpoint"
            )
            self._log(client, run_id, model.model_id, step, rows)
            client.finalize_logged_model(model.model_id, "READY")
            self._outbox.set_model(str(step), {"id": model.model_id})
        if self._uploads and self._outbox.status == "FINISHED":
            self._send_trained(client, experiment_id, run_id, rows)

    def _send_trained(
        self, client: Any, experiment_id: str, run_id: str, rows: Mapping[int, Mapping[str, float]]
    ) -> None:
        digest = self._digest()
        if not digest or self._outbox.models.get(_TRAINED, {}).get("digest") == digest:
            return
        if _TRAINED in self._outbox.models:  # the run was trained longer
            self._delete(client, _TRAINED)
        summary = json.loads((self._folder / "summary.json").read_text(encoding="utf-8"))
        step = (summary.get("best") or {}).get("step", summary["steps"])
        tags = {"vitscale.step": str(step), "vitscale.model": str((self._folder / "model").resolve())}
        model = client.create_logged_model(experiment_id, self._name, run_id, tags=tags, model_type="vit")
        self._outbox.set_model(_TRAINED, {"id": model.model_id})
        with tempfile.TemporaryDirectory(dir=self._folder) as staged:
            describe(Path(staged), self._files(), run_id=run_id, model_id=model.model_id)
            client.log_model_artifacts(model.model_id, staged)
        self._log(client, run_id, model.model_id, step, rows)
        client.finalize_logged_model(model.model_id, "READY")
        self._outbox.set_model(_TRAINED, {"id": model.model_id, "digest": digest})

    def _log(self, client: Any, run_id: str, model_id: str, step: int, rows: Mapping[int, Mapping[str, float]]) -> None:
        from mlflow.entities import Metric

        logged = max((each for each in rows if each <= step), default=None)  # not every saved step has a row
        if logged is None:
            return
        row = dict(rows[logged])
        time = int(row.pop("time", 0))
        metrics = [Metric(name, value, time, logged, model_id=model_id) for name, value in row.items()]
        if metrics:
            client.log_batch(run_id, metrics=metrics)

    def _delete(self, client: Any, key: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.delete_logged_model(self._outbox.models[key]["id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # somebody has deleted it there
                raise
        self._outbox.set_model(key, None)

    def _files(self) -> list[Path]:
        return sorted(path for path in (self._folder / "model").glob("*") if path.is_file())

    def _digest(self) -> str:
        """What tells one trained model from another without reading it; '' where there is none."""
        return " ".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in self._files())


def describe(folder: Path, files: Sequence[Path], **known: str) -> None:
    """Fill an empty folder: a model's files, as links where the file system has them, and what makes them a
    python_function that takes encoded images.

    known: what MLflow's Model is told besides, such as run_id.
    """
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    (folder / "data").mkdir()
    for path in files:
        try:
            os.link(path, folder / "data" / path.name)  # MLflow takes no symbolic links
        except OSError:
            shutil.copyfile(path, folder / "data" / path.name)
    (folder / "requirements.txt").write_text(f"vitscale=={vitscale.__version__}\n")
    described = Model(signature=ModelSignature(inputs=Schema([ColSpec(DataType.binary, "image")])), **known)
    pyfunc.add_to_model(described, loader_module=_LOADER, data="data")
    described.save(str(folder / "MLmodel"))
