"""A real MLflow server on this machine, for trials that take it away from a run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import psutil

from vitscale.errors import LaunchError
from vitscale.run_folder import RunFolder
from vitscale.tracking.jsonl import JsonlFile

_STARTING_S = 120.0
_ANSWERING_S = 10.0


class MlflowServer:
    """`mlflow server` on 127.0.0.1 with its files in `folder`; a context in which it is up unless it is ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MlflowServer:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        """Returns once it answers. LaunchError where it does not."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = self._folder / "log"
        with open(log, "ab") as out:
            self._process = subprocess.Popen(
                command, env={**os.environ, **quiet}, stdout=out, stderr=out, cwd=self._folder, start_new_session=True
            )
        ends = time.monotonic() + _STARTING_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > ends:
                raise LaunchError(f"`{' '.join(command)}` does not answer: {log} says why")
            time.sleep(0.1)

    def end(self) -> None:
        """Kill it and all that it started."""
        if self._process is not None:
            for process in reversed(self._family()):
                process.kill()
            self._process.wait()

    def halt(self) -> None:
        """It takes connections and answers none, until `go_on`."""
        for process in self._family():
            process.suspend()

    def go_on(self) -> None:
        for process in self._family():
            process.resume()

    def differences(self, run: RunFolder) -> list[str]:
        """How its curve of the loss differs, after `vitscale sync`, from the run's rows; nothing, if each step
        is there once."""
        subprocess.run([sys.executable, "-m", "vitscale.cli", "sync", run.path], stdout=subprocess.DEVNULL, check=False)
        ids = sorted(run.path.glob("mlflow_run_id*"))
        if not ids:
            return ["MLflow has no run"]
        query = {"run_id": ids[0].read_text("utf-8").strip(), "metric_key": "loss", "max_results": 10_000}
        address = f"{self.uri}/api/2.0/mlflow/metrics/get-history?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=_ANSWERING_S) as answer:
            points = json.load(answer).get("metrics", [])
        curve = [(int(point["step"]), float(point["value"])) for point in points]
        rows = [(int(row["step"]), float(row["loss"])) for row in JsonlFile(run.metrics).rows()]
        return [] if sorted(curve) == rows else [f"MLflow has {len(curve)} points, and not those of {len(rows)} rows"]

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
            return answer.status == 200
        return False

    def _family(self) -> list[psutil.Process]:
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        return []
