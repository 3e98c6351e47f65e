"""A real run and a real MLflow server that comes and goes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.integration.test_resume import signal_at_step
from tests.integration.worlds import Launcher, rows
from tests.tracking.conftest import Relay, Server, _mlflow_settings, relay, server  # noqa: F401 - fixtures
from vitscale.run_folder import STOPPED


@pytest.fixture
def argv(config: Path, relay: Relay) -> list[str]:  # noqa: F811
    uri = f"tracking.mlflow_uri={relay.uri}"
    return ["pretrain", str(config), "tracking.mlflow=true", uri, "parallel.zero_stage=2", "train.steps=40"]


def test_down_at_the_start_killed_then_resumed(
    launcher: Launcher,
    argv: list[str],
    tmp_path: Path,
    relay: Relay,  # noqa: F811
    server: Server,  # noqa: F811
) -> None:
    """Down at the start, up at the resume, cut off at the end, synced: one run, each step once, FINISHED."""
    from mlflow.tracking import MlflowClient

    run = tmp_path / "runs" / "run"
    world = launcher.start(argv, 2)
    signal_at_step(world, run, 7, rank=0, number=signal.SIGTERM)
    assert world.wait() == [STOPPED] * 2, world.output()
    assert "training goes on" in world.output()

    relay.up()
    world = launcher.start(argv, 2)
    deadline = time.monotonic() + 60
    while not (run / "mlflow_run_id").exists():
        assert time.monotonic() < deadline, world.output()
        time.sleep(0.05)
    relay.down()
    assert world.wait() == [0, 0], world.output()

    relay.up()
    launcher.run(["sync", str(run)])
    client = MlflowClient(server.uri)
    run_id = (run / "mlflow_run_id").read_text().strip()
    assert client.get_run(run_id).info.status == "FINISHED"
    expected = {row["step"]: row["loss"] for row in rows(run)}
    assert sorted(expected) == list(range(1, 41))
    history = client.get_metric_history(run_id, "loss")
    assert [point.step for point in history] == sorted(expected)
    assert {point.step: point.value for point in history} == expected
    assert {"figures", "config.yaml", "summary.json"} <= {item.path for item in client.list_artifacts(run_id)}
