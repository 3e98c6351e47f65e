"""A process with Trackers: nothing of MLflow on its terminal, and no waiting for a server that hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.tracking.conftest import Relay, Server
from tests.tracking.test_tracker import curve, expected, until


def test_a_world_keeps_mlflow_from_printing_where_a_run_is():
    """Else set_terminated prints the server's URI, with the password that may be in it, to the run's terminal."""
    name = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"
    program = f"import os; from vitscale import world; world.enter(); print(os.environ.get({name!r}))"
    bare = {key: value for key, value in os.environ.items() if key != name}
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", program], env=bare, cwd=root, text=True) == "true\n"


PROGRAM = """
import sys
from pathlib import Path
from vitscale import world
world.enter()
from tests.tracking.conftest import config, row
from vitscale.tracking.jsonl import JsonlFile
from vitscale.tracking.tracker import Tracker
assert not {"mlflow", "torch"} & set(sys.modules)

def track(name, uri, wait):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    tracker = Tracker(folder, config(uri))
    tracker.start()
    for step in range(1, 11):
        JsonlFile(folder / "metrics.jsonl").append(row(step))
        tracker.notice()
    if name == "hanging":
        sys.stdin.readline()
    print(name, "sent" if tracker.finish("FINISHED", wait) else "not sent")

track("sqlite", None, 100)
track("server", sys.argv[2], 100)
track("hanging", sys.argv[3], 0.5)
"""


def test_the_terminal_and_the_exit_stay_the_runs(tmp_path: Path, server: Server, relay: Relay):
    relay.hanging()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), server.uri, relay.uri]
    environment = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "500"}  # whoever waited for an answer would be missed
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parents[2], text=True, stdin=pipe, stdout=pipe, stderr=pipe
    )
    until(lambda: relay.accepted > 0, seconds=120)
    began = time.monotonic()
    shown, complained = process.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert (process.returncode, shown) == (0, "sqlite sent\nserver sent\nhanging not sent\n")
    assert "`vitscale sync" in complained
    assert len(complained.splitlines()) == 1
    for name, uri in (("sqlite", f"sqlite:///{tmp_path}/sqlite/mlflow.db"), ("server", server.uri)):
        assert curve(tmp_path / name, uri) == expected(range(1, 11))
