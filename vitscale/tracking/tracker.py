"""MLflow, fed by a thread from metrics.jsonl: whatever the server does, no step and no exit waits for it.

The rows of metrics.jsonl are the truth; what MLflow already holds of them it is asked for at every
connection, and only later steps are sent, each with its own time. The run's id lies in the run folder.
Only here is mlflow imported, and only in the thread (it takes seconds).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import vitscale
from vitscale.config.schema import RunConfig, as_dict
from vitscale.errors import ConfigError
from vitscale.files.atomic import write_atomically
from vitscale.run_folder import RunFolder
from vitscale.text import redact, to_stderr
from vitscale.tracking.jsonl import JsonlTail, as_number
from vitscale.tracking.models import LoggedModels
from vitscale.tracking.outbox import Outbox, flat_params
from vitscale.tracking.system import SystemSampler

ROW_FILES = ("metrics.jsonl", "evaluation.jsonl")  # no metric stands in both
METRICS_A_CALL, PARAMS_A_CALL = 1000, 100  # MLflow's limits of log_batch
LONGEST_PARAM, LONGEST_TAG = 6000, 8000  # characters
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
GATHER_S = 2.0  # rows that come within it go in one call
SAMPLE_S = 10.0  # between two looks at the machine
SAMPLES_KEPT = 360  # of the machine, while the server does not answer
_NOTHING = (-1, -1)
ROWS_KEPT = 500  # the newest, for the checkpoints of their steps
_UPLOAD_BYTES_A_SECOND = 20e6  # at the least; a slower upload is left to `vitscale sync`
_NOT_IN_NAMES = re.compile(r"[^\w\-./: ]")
_KEY_TAG = "vitscale.key"


def tracking_uri(run_folder: Path, config: RunConfig) -> str:
    """Where the run is tracked: tracking.mlflow_uri, else a sqlite file in the run's folder."""
    return config.tracking.mlflow_uri or f"sqlite:///{(run_folder / 'mlflow.db').resolve()}"


class Tracker:
    """Rank 0's line to MLflow. None of its methods waits for the server but `finish`, for as long as it is told."""

    def __init__(
        self,
        run_folder: Path,
        config: RunConfig,
        tags: dict[str, str] | None = None,
        report: Callable[[str], None] = to_stderr,
    ) -> None:
        known = {"vitscale.version": vitscale.__version__, "host": socket.gethostname()}
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            known["mlflow.user"] = getpass.getuser()
        self._sender = _Sender(run_folder, config, known | (tags or {}))
        self._folder, self._report = run_folder, report
        self._wake, self._closing = threading.Event(), threading.Event()
        self._deadline = 0.0
        self._all_sent = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._on = config.tracking.mlflow

    def start(self) -> None:
        """Begin to send. Call it when the heavy imports are done: importing mlflow beside them slows both."""
        if self._on:
            self._sender.outbox.set_status("RUNNING")
            self._thread.start()

    def notice(self) -> None:
        """A row was appended."""
        self._wake.set()

    def finish(self, status: str, wait_s: float = 10.0) -> bool:
        """End with status FINISHED, KILLED or FAILED; True when MLflow has it all.

        Takes at most `wait_s`, and what a model needs that is to be uploaded.
        """
        if not self._thread.is_alive():
            return not self._on
        self._sender.outbox.set_status(status)
        if status == "FINISHED":
            wait_s += self._sender.models.upload_bytes / _UPLOAD_BYTES_A_SECOND
        self._deadline = time.monotonic() + wait_s
        self._closing.set()
        self._wake.set()
        self._thread.join(wait_s)
        if not self._all_sent:
            self._report(
                f"MLflow at {self._sender.name} has not got everything of this run; "
                f"`vitscale sync {self._folder}` or the next start sends the rest"
            )
        return self._all_sent

    def _work(self) -> None:
        failures = 0
        while True:
            closing = self._closing.is_set()
            self._wake.clear()
            try:
                self._sender.send()
                if failures and not closing:
                    self._report(f"MLflow at {self._sender.name} answers again")
                failures = 0
            except Exception as error:  # nothing of MLflow may end or disturb the run
                failures += 1
                if failures == 1 and not closing:
                    self._report(
                        f"MLflow at {self._sender.name}: {_one_line(error)}; training goes on, "
                        "metrics.jsonl keeps the curves until it answers"
                    )
            if closing and (not failures or time.monotonic() >= self._deadline):
                self._all_sent = not failures
                return
            if failures:
                pause = min(FIRST_RETRY_S * 2 ** (failures - 1), LONGEST_RETRY_S)
                time.sleep(FIRST_RETRY_S) if closing else self._closing.wait(pause)
            else:
                self._wake.wait(SAMPLE_S)
                self._closing.wait(GATHER_S)


def sync(run_folder: Path, config: RunConfig, report: Callable[[str], None] = print) -> bool:
    """Send what MLflow lacks of a run, in the foreground; True when it has it all."""
    sender = _Sender(run_folder, config, {})
    sender.outbox.set_status(_status_at_exit(run_folder) or sender.outbox.status)
    sender.outbox.add_standard()
    try:
        sender.send()
    except Exception as error:
        report(
            f"MLflow at {sender.name}: {_one_line(error)}; nothing is lost: once that is mended, "
            f"`vitscale sync {run_folder}` sends it"
        )
        return False
    report(f"MLflow at {sender.name} has all of {run_folder}")
    return True


def _status_at_exit(run_folder: Path) -> str | None:
    """MLflow's word for how a run that is not running ended; None where it did not say."""
    path = run_folder / "exit.json"
    code = json.loads(path.read_text(encoding="utf-8"))["code"] if path.exists() else None
    return None if code is None else {0: "FINISHED", 3: "KILLED"}.get(code, "FAILED")


def _one_line(error: Exception) -> str:
    text = redact(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}"


class _Sender:
    """Sends what is not sent yet, in this thread; any exception means that some of it is still to be sent."""

    def __init__(self, run_folder: Path, config: RunConfig, tags: dict[str, str]) -> None:
        self._folder, self._tracking, self._run_name = run_folder, config.tracking, config.run.name
        self._uri = tracking_uri(run_folder, config)
        self.name = redact(self._uri)
        self._params = {key: text[:LONGEST_PARAM] for key, text in flat_params(as_dict(config)).items()}
        self.outbox = Outbox(run_folder, tags)
        self._tails = {name: JsonlTail(run_folder / name) for name in ROW_FILES}
        self._client: Any = None
        self._run_id = ""
        self._course = len(RunFolder(run_folder).rollbacks())  # as it is now: one more may end this process
        self._parent = parent_folder(config)
        if self._parent is not None:
            self.outbox.tags["vitscale.parent_run"] = str(self._parent)
        self._held: dict[str, tuple[int, int]] = {}  # the last step that MLflow has of each metric, and its time
        self._status = ""  # that MLflow has
        self._started_ms = 0
        self._sampler: SystemSampler | None = None
        self._samples: deque[tuple[int, dict[str, float]]] = deque(maxlen=SAMPLES_KEPT)
        self._next_sample = 0.0
        self._rows: dict[int, dict[str, float]] = {}  # the newest, by step
        uploads = self._tracking.log_model
        uploads = self._tracking.mlflow_uri is not None if uploads is None else uploads
        self.models = LoggedModels(run_folder, config.run.name, uploads, self.outbox)
        self._experiment_id = ""

    def send(self) -> None:
        """Rows first, then status, then files: what fails last holds up least."""
        self._sample()
        try:
            if self._client is None:
                self._connect()
            self._send_rows()
            self._send_samples()
            self._send_status()
            self._send_artifacts()
            self.models.send(self._client, self._experiment_id, self._run_id, self._rows)
        except Exception:
            self._client = None  # ask anew what the server holds: a call that failed may have been done
            raise

    # ---- the run

    def _connect(self) -> None:
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # the terminal is the run's
        client = MlflowClient(tracking_uri=self._uri)
        run = self._saved_run(client) or self._found_or_new_run(client)
        if run.info.run_id != self._run_id:
            self._run_id, self._held = run.info.run_id, {}
            if _id_of(self._folder, self._course) != self._run_id:
                self.outbox.forget_models()
            self._rewind()
            write_atomically(RunFolder(self._folder).mlflow_run_id(self._course), self._run_id + "\n")
        held = {metric.key: (metric.step, metric.timestamp) for metric in run.data.to_proto().metrics}
        if any(held.get(key, _NOTHING) < last for key, last in self._held.items()):
            self._rewind()  # the server has lost some of what it took
        self._held = held
        self._status, self._started_ms = run.info.status, run.info.start_time
        self._experiment_id = run.info.experiment_id
        self._send_params(client, run.data.params, run.data.tags)
        self._client = client

    def _saved_run(self, client: Any) -> Any:
        """The run whose id lies in the run folder, or None where this server does not have it."""
        return _active_run(client, _id_of(self._folder, self._course))

    def _found_or_new_run(self, client: Any) -> Any:
        """The run that bears this folder's key (its making was cut off before the id was written), or a new one."""
        experiment, key = self._experiment(client), self.outbox.key + f".{self._course}" * (self._course > 0)
        found = client.search_runs([experiment], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            return found[0]
        tags = {_KEY_TAG: key, "mlflow.source.name": "vitscale", "mlflow.source.type": "LOCAL"}
        parent_id = "" if self._parent is None else _id_of(self._parent, len(RunFolder(self._parent).rollbacks()))
        if self._course:  # what went before the rollback stays as it was sent
            parent_id = _id_of(self._folder, self._course - 1)
        if (parent := _active_run(client, parent_id)) is not None:
            tags["mlflow.parentRunId"] = parent.info.run_id
        return client.create_run(experiment, run_name=self._run_name, tags=tags)

    def _experiment(self, client: Any) -> str:
        name = self._tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise ConfigError(
                f"tracking.experiment={name!r}: was deleted there; bring it back by `mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}`, or name another experiment"
            )
        if experiment is not None:
            return experiment.experiment_id
        artifacts = None  # a server has its own place for them
        if self._uri.startswith("sqlite:///"):
            database = Path(self._uri.removeprefix("sqlite:///")).resolve()
            artifacts = (database.parent / "mlflow-artifacts").as_uri()
        # Or MLflow's pages show evaluations of language models first.
        return client.create_experiment(name, artifacts, tags={"mlflow.experimentKind": "custom_model_development"})

    def _send_params(self, client: Any, held: dict[str, str], held_tags: dict[str, str]) -> None:
        """Params, which MLflow never changes: one that has another value now becomes the tag changed.NAME."""
        from mlflow.entities import Param, RunTag

        new = [Param(key, text) for key, text in self._params.items() if key not in held]
        tags = dict(self.outbox.tags)
        for key, text in self._params.items():
            if (key in held and held[key] != text) or f"changed.{key}" in held_tags:
                tags[f"changed.{key}"] = text
        fresh = [RunTag(key, text[:LONGEST_TAG]) for key, text in tags.items() if held_tags.get(key) != text]
        for part in _parts(new, PARAMS_A_CALL):
            client.log_batch(self._run_id, params=part)
        for part in _parts(fresh, PARAMS_A_CALL):
            client.log_batch(self._run_id, tags=part)

    # ---- what it is told

    def _rewind(self) -> None:
        for tail in self._tails.values():
            tail.rewind()

    def _send_rows(self) -> None:
        for name, tail in self._tails.items():
            while (found := tail.peek()) is not None:
                rows, position = found
                self._send_metrics(rows, steps_repeat=name == "evaluation.jsonl")
                tail.take(position)

    def _send_metrics(self, rows: list[dict[str, Any]], steps_repeat: bool) -> None:
        """What MLflow lacks of some rows; the metrics of one row go in one call.

        steps_repeat: whether a later row of the same step counts, as of a model that is scored again.
        """
        from mlflow.entities import Metric

        batch: list[Any] = []
        for row in rows[-ROWS_KEPT:]:
            self._rows[row["step"]] = (
                self._rows.pop(row["step"], {}) | dict(_row_metrics(row)) | {"time": row.get("time", 0)}
            )
        for step in list(self._rows)[:-ROWS_KEPT]:
            del self._rows[step]
        for row in rows:
            metrics = [
                Metric(name, value, int(row.get("time", 0)), row["step"])
                for name, value in _row_metrics(row)
                if (row["step"], int(row.get("time", 0)) if steps_repeat else -1) > self._held.get(name, _NOTHING)
            ]
            if len(batch) + len(metrics) > METRICS_A_CALL:
                self._log(batch)
                batch = []
            batch += metrics
        self._log(batch)

    def _log(self, metrics: list[Any]) -> None:
        for part in _parts(metrics, METRICS_A_CALL):
            self._client.log_batch(self._run_id, metrics=part)
        for metric in metrics:
            self._held[metric.key] = max((metric.step, metric.timestamp), self._held.get(metric.key, _NOTHING))

    def _sample(self) -> None:
        """Look at the machine, if it is time to and the server has answered once."""
        if self._run_id and time.monotonic() >= self._next_sample:
            self._next_sample = time.monotonic() + SAMPLE_S
            self._sampler = self._sampler or SystemSampler()
            self._samples.append((int(time.time() * 1000), self._sampler.sample()))

    def _send_samples(self) -> None:
        """The samples of the machine, at seconds since the run began as their steps."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, when, max(when - self._started_ms, 0) // 1000)
            for when, sample in self._samples
            for name, value in sample.items()
        ]
        for part in _parts(metrics, METRICS_A_CALL):
            self._client.log_batch(self._run_id, metrics=part)
        self._samples.clear()

    def _send_status(self) -> None:
        status = self.outbox.status
        if status == self._status:
            return
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status)
        self._status = status

    def _send_artifacts(self) -> None:
        for path in self.outbox.artifacts():
            if path.exists():
                self._client.log_artifact(self._run_id, str(path))
            self.outbox.uploaded(path)


def _row_metrics(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of every number in a row."""
    for name, value in row.items():
        if name not in ("step", "time") and (number := as_number(value)) is not None:
            yield _NOT_IN_NAMES.sub("_", name)[:250], number


def parent_folder(config: RunConfig) -> Path | None:
    """The folder of the run whose weights this one started from; None where they are of no run here."""
    if config.model.init_from is None:
        return None
    source = Path(config.model.init_from).expanduser()
    folders = (source, source.parent)  # a run's folder is named, or its model/
    return next((folder.resolve() for folder in folders if (folder / "config.yaml").is_file()), None)


def _id_of(run_folder: Path, course: int) -> str:
    path = RunFolder(run_folder).mlflow_run_id(course)
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _active_run(client: Any, run_id: str) -> Any:
    """The run as this server has it, or None where it has none of this id, or a deleted one."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
