"""A real MLflow server on the loopback, a relay in front of it that can fail, and migrated sqlite files."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vitscale.config.schema import Run, RunConfig, Tracking

# What world.enter() sets for a run; the tests of this folder do not enter a world.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


@pytest.fixture(autouse=True, scope="session")
def _mlflow_settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        yield


class Server:
    """`mlflow server` on 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.database, self.port = folder / "server.db", free_port()
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
        with open(folder / "log", "wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        self.uri = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        except OSError:
            return False

    def close(self) -> None:
        for child in psutil.Process(self._process.pid).children(recursive=True):
            child.kill()
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, _mlflow_settings: None) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    shutil.copy(server.database, server.database.with_name("template.db"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def template(server: Server) -> Path:
    """An MLflow sqlite file with its tables and nothing else; making one takes seconds, copying it does not."""
    return server.database.with_name("template.db")


@pytest.fixture
def run_folder(tmp_path: Path, template: Path) -> Path:
    """A run's folder with an empty MLflow database."""
    folder = tmp_path / "a run's folder"
    folder.mkdir()
    shutil.copy(template, folder / "mlflow.db")
    return folder


class Relay:
    """A port that is as a server's when `up`, refuses when `down`, takes and never answers when `hanging`.

    `down` and `hanging` cut the connections that are open.
    """

    def __init__(self, target: int) -> None:
        self._target, self.port = target, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self.accepted = 0

    def up(self) -> None:
        self._listen(relaying=True)

    def hanging(self) -> None:
        self._listen(relaying=False)

    def down(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for end in self._open:
            _shut(end)
        self._open.clear()

    def _listen(self, relaying: bool) -> None:
        self.down()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener, relaying), daemon=True).start()

    def _accept(self, listener: socket.socket, relaying: bool) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.append(client)
            if relaying:
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open.append(server)
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass  # cut: the other direction is cut below
    _shut(source)
    _shut(sink)


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    relay = Relay(server.port)
    yield relay
    relay.down()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def config(uri: str | None = None, **keys: Any) -> RunConfig:
    return RunConfig(run=Run(name="trial"), tracking=Tracking(mlflow_uri=uri), **keys)


def row(step: int, start: int = 1_700_000_000_000) -> dict[str, Any]:
    """A row of metrics.jsonl whose values tell the step."""
    return {"step": step, "samples": step * 256, "loss": 1 / (step + 1), "note": "no number", "time": start + step}
