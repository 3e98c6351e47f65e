"""A process with a Tracker: what it shows on its terminal, and that it leaves when the server hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tracking.conftest import Relay, Server
from tests.tracking.test_tracker import curve, expected

PROGRAM = """
import sys
from pathlib import Path
from vitscale import world
world.enter()
from tests.tracking.conftest import config, row
from vitscale.tracking.jsonl import JsonlFile
from vitscale.tracking.tracker import Tracker
assert not {"mlflow", "torch"} & set(sys.modules)
folder, uri, wait = Path(sys.argv[1]), sys.argv[2] or None, float(sys.argv[3])
tracker = Tracker(folder, config(uri))
tracker.start()
for step in range(1, 11):
    JsonlFile(folder / "metrics.jsonl").append(row(step))
    tracker.notice()
print("sent" if tracker.finish("FINISHED", wait) else "not sent")
"""


def run(folder: Path, uri: str, wait: float, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), uri, str(wait)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, env=os.environ | environment, cwd=root, capture_output=True, text=True, timeout=60,
                          check=True)


@pytest.mark.parametrize("where", ["new sqlite file", "server"])
def test_the_terminal_stays_the_runs(tmp_path: Path, server: Server, where: str):
    uri = "" if where == "new sqlite file" else server.uri
    outcome = run(tmp_path, uri, wait=30)
    assert (outcome.stdout, outcome.stderr) == ("sent\n", "")
    assert curve(tmp_path, uri or f"sqlite:///{tmp_path}/mlflow.db") == expected(range(1, 11))


def test_a_hanging_server_does_not_hold_the_exit(tmp_path: Path, relay: Relay):
    relay.hanging()
    began = time.monotonic()
    outcome = run(tmp_path, relay.uri, wait=4.0, MLFLOW_HTTP_REQUEST_TIMEOUT="500")
    assert time.monotonic() - began < 60
    assert outcome.stdout == "not sent\n"
    assert "`vitscale sync" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert relay.accepted > 0
