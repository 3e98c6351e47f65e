from __future__ import annotations

import contextlib
import getpass
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.tracking.conftest import Relay, Server, config, row
from vitscale.config.schema import Optimizer, Train
from vitscale.tracking import tracker as module
from vitscale.tracking.jsonl import JsonlFile
from vitscale.tracking.tracker import Tracker, sync, tracking_uri


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER_S", 0.05)
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.1)
    monkeypatch.setattr(module, "LONGEST_RETRY_S", 0.4)


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log(folder: Path, steps: range, start: int = 1_700_000_000_000) -> None:
    for step in steps:
        JsonlFile(folder / "metrics.jsonl").append(row(step, start))


def run_id(folder: Path) -> str:
    return (folder / "mlflow_run_id").read_text().strip()


def curve(folder: Path, uri: str, key: str = "loss") -> list[tuple[int, float, int]]:
    """(step, value, time) of a metric as MLflow has it."""
    history = MlflowClient(uri).get_metric_history(run_id(folder), key)
    return sorted((point.step, point.value, point.timestamp) for point in history)


def expected(steps: range, start: int = 1_700_000_000_000) -> list[tuple[int, float, int]]:
    return [(step, 1 / (step + 1), start + step) for step in steps]


def status(folder: Path, uri: str) -> str:
    return MlflowClient(uri).get_run(run_id(folder)).info.status


def test_a_whole_run_in_the_sqlite_file_of_its_folder(run_folder):
    settings = config()
    uri = tracking_uri(run_folder, settings)
    said: list[str] = []
    tracker = Tracker(run_folder, settings, {"mlflow.source.git.commit": "abc"}, said.append)
    tracker.start()
    log(run_folder, range(1, 2001))  # more than one call takes
    odd = {"loss": float("nan"), "a:b(%)": 3, "text": "x", "flag": True}
    JsonlFile(run_folder / "metrics.jsonl").append(row(2001) | odd)
    tracker.notice()
    (run_folder / "config.yaml").write_text("run: {name: trial}\n")
    (run_folder / "figures").mkdir()
    (run_folder / "figures" / "loss.png").write_bytes(b"png")
    assert tracker.finish("FINISHED", 30)
    assert said == []

    client = MlflowClient(uri)
    run = client.get_run(run_id(run_folder))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "trial")
    assert client.get_experiment(run.info.experiment_id).name == "vitscale"
    assert curve(run_folder, uri)[:2000] == expected(range(1, 2001))
    step, value, _ = curve(run_folder, uri)[2000]
    assert step == 2001
    assert value != value  # NaN
    assert curve(run_folder, uri, "a:b___") == [(2001, 3.0, 1_700_000_002_001)]
    assert {name for name in run.data.metrics if not name.startswith("system/")} == {"loss", "samples", "a:b___"}
    assert run.data.params["train.global_batch"] == "256"
    assert run.data.params["optimizer.betas"] == "[0.9, 0.95]"
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert run.data.tags["vitscale.version"]
    assert run.data.tags["mlflow.user"] == getpass.getuser()
    artifacts = run_folder / "mlflow-artifacts" / run.info.run_id / "artifacts"
    found = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}
    assert found == {"config.yaml", "figures/loss.png"}


def test_the_machine_is_sampled_once_the_server_answered(run_folder, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_S", 0.1)
    settings = config()
    tracker = Tracker(run_folder, settings)
    tracker.start()
    uri = tracking_uri(run_folder, settings)
    until(
        lambda: (
            (run_folder / "mlflow_run_id").exists()
            and len(curve(run_folder, uri, "system/cpu_utilization_percentage")) >= 3
        )
    )
    assert tracker.finish("FINISHED", 30)
    memory = curve(run_folder, uri, "system/process_memory_usage_megabytes")
    assert all(value > 10 for _, value, _ in memory)


def test_off_is_off(tmp_path):
    settings = replace(config(), tracking=replace(config().tracking, mlflow=False))
    tracker = Tracker(tmp_path, settings)
    tracker.start()
    tracker.notice()
    assert tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_resumed_after_a_cut_back_no_step_comes_twice(run_folder):
    """MLflow has steps beyond the checkpoint; they are computed again, at other times, and not sent again."""
    settings, later = config(), 1_800_000_000_000
    uri = tracking_uri(run_folder, settings)
    first = Tracker(run_folder, settings)
    first.start()
    log(run_folder, range(1, 31))
    assert first.finish("KILLED", 30)
    assert status(run_folder, uri) == "KILLED"
    one = run_id(run_folder)

    JsonlFile(run_folder / "metrics.jsonl").cut_back(20)
    second = Tracker(run_folder, settings)
    second.start()
    log(run_folder, range(21, 26), later)
    second.notice()
    until(lambda: status(run_folder, uri) == "RUNNING")
    # Other keys go on from what MLflow has of each of them.
    JsonlFile(run_folder / "metrics.jsonl").append({"step": 25, "score": 0.5, "time": later})
    log(run_folder, range(26, 41), later)
    assert second.finish("FINISHED", 30)
    assert run_id(run_folder) == one
    assert curve(run_folder, uri) == expected(range(1, 31)) + expected(range(31, 41), later)
    assert curve(run_folder, uri, "score") == [(25, 0.5, later)]
    assert status(run_folder, uri) == "FINISHED"


def test_cut_back_under_a_running_tracker(run_folder):
    settings = config()
    tracker = Tracker(run_folder, settings)
    tracker.start()
    log(run_folder, range(1, 11))
    tracker.notice()
    uri = tracking_uri(run_folder, settings)
    until(lambda: (run_folder / "mlflow_run_id").exists() and len(curve(run_folder, uri)) == 10)
    JsonlFile(run_folder / "metrics.jsonl").cut_back(5)
    log(run_folder, range(6, 16), 1_800_000_000_000)
    assert tracker.finish("FINISHED", 30)
    assert curve(run_folder, uri) == expected(range(1, 11)) + expected(range(11, 16), 1_800_000_000_000)


def test_params_that_changed_become_tags(run_folder):
    settings = config()
    starts = [(Optimizer(), Train()), (Optimizer(lr=1e-3), Train(steps=7)), (Optimizer(), Train(steps=7))]
    for optimizer, train in starts:
        tracker = Tracker(run_folder, replace(settings, optimizer=optimizer, train=train))
        tracker.start()
        assert tracker.finish("KILLED", 30)
        data = MlflowClient(tracking_uri(run_folder, settings)).get_run(run_id(run_folder)).data
        assert data.params["optimizer.lr"] == "0.00015"
        if optimizer.lr == 1e-3:
            assert data.tags["changed.optimizer.lr"] == "0.001"
    changed = {key: value for key, value in data.tags.items() if key.startswith("changed.")}
    assert changed == {"changed.optimizer.lr": "0.00015", "changed.train.steps": "7"}


def test_a_run_that_this_mlflow_does_not_have_is_made_anew(run_folder):
    settings = config()
    uri = tracking_uri(run_folder, settings)
    log(run_folder, range(1, 4))
    for broken in ("0" * 32, "garbage!", ""):
        (run_folder / "mlflow_run_id").write_text(broken)
        assert sync(run_folder, settings)
        assert curve(run_folder, uri) == expected(range(1, 4))
    assert len(MlflowClient(uri).search_runs(["1"])) == 1  # found by its key
    MlflowClient(uri).delete_run(run_id(run_folder))
    assert sync(run_folder, settings)
    assert curve(run_folder, uri) == expected(range(1, 4))
    assert len(MlflowClient(uri).search_runs(["1"])) == 1


def test_what_follows_a_rollback_is_a_run_below(run_folder):
    """What was sent of the course that diverged stays; the new one has all rows of its own."""
    settings, later = config(), 1_800_000_000_000
    uri = tracking_uri(run_folder, settings)
    log(run_folder, range(1, 11))
    assert sync(run_folder, settings)
    JsonlFile(run_folder / "metrics.jsonl").cut_back(5)
    (run_folder / "rollbacks.json").write_text('[{"step": 10, "skipped_batches": [8, 9]}]')
    log(run_folder, range(6, 13), later)
    for _ in range(2):  # found again the second time
        assert sync(run_folder, settings)
    assert curve(run_folder, uri) == expected(range(1, 11))
    below = MlflowClient(uri).get_run((run_folder / "mlflow_run_id_1").read_text().strip())
    assert below.data.tags["mlflow.parentRunId"] == run_id(run_folder)
    history = MlflowClient(uri).get_metric_history(below.info.run_id, "loss")
    points = sorted((point.step, point.value, point.timestamp) for point in history)
    assert points == expected(range(1, 6)) + expected(range(6, 13), later)
    assert len(MlflowClient(uri).search_runs(["1"])) == 2


def test_sync_tells_how_the_run_ended(run_folder):
    settings = config()
    log(run_folder, range(1, 4))
    (run_folder / "exit.json").write_text('{"code": 3}')
    said: list[str] = []
    assert sync(run_folder, settings, said.append)
    assert status(run_folder, tracking_uri(run_folder, settings)) == "KILLED"
    assert said == [f"MLflow at {tracking_uri(run_folder, settings)} has all of {run_folder}"]


def test_an_experiment_that_was_deleted_is_named_with_the_way_back(run_folder: Path):
    settings = config()
    log(run_folder, range(1, 4))
    uri = tracking_uri(run_folder, settings)
    assert sync(run_folder, settings)
    client = MlflowClient(uri)
    number = client.get_experiment_by_name(settings.tracking.experiment).experiment_id
    client.delete_experiment(number)
    (run_folder / "mlflow_run_id").unlink(missing_ok=True)
    lines: list[str] = []
    assert not sync(run_folder, settings, lines.append)
    assert f"`mlflow experiments restore --experiment-id {number}`" in lines[0]
    assert f"`vitscale sync {run_folder}` sends it" in lines[0]
    client.restore_experiment(number)
    assert sync(run_folder, settings)


def test_a_sqlite_file_of_the_users(run_folder: Path, tmp_path: Path):
    (tmp_path / "shared").mkdir()
    (run_folder / "mlflow.db").rename(tmp_path / "shared" / "all runs.db")
    log(run_folder, range(1, 4))
    (run_folder / "summary.json").write_text("{}")
    uri = f"sqlite:///{tmp_path}/shared/all runs.db"
    assert sync(run_folder, config(uri))
    assert curve(run_folder, uri) == expected(range(1, 4))
    assert len(list((tmp_path / "shared" / "mlflow-artifacts").rglob("summary.json"))) == 1


# ---- with a server that fails


def test_down_at_the_start_then_up(tmp_path: Path, relay: Relay, server: Server):
    said: list[str] = []
    tracker = Tracker(tmp_path, config(relay.uri), report=said.append)
    tracker.start()
    log(tmp_path, range(1, 51))
    tracker.notice()
    until(lambda: len(said) == 1)
    assert "training goes on" in said[0]
    relay.up()
    until(lambda: len(said) == 2)
    assert said[1].endswith("answers again")
    log(tmp_path, range(51, 61))
    assert tracker.finish("FINISHED", 30)
    assert curve(tmp_path, server.uri) == expected(range(1, 61))
    assert MlflowClient(server.uri).get_run(run_id(tmp_path)).info.status == "FINISHED"


def test_dies_in_the_middle_again_and_again(tmp_path: Path, relay: Relay, server: Server):
    relay.up()
    tracker = Tracker(tmp_path, config(relay.uri), report=lambda text: None)
    tracker.start()
    for part in range(6):
        log(tmp_path, range(part * 100 + 1, part * 100 + 101))
        tracker.notice()
        time.sleep(0.1)
        relay.hanging() if part == 3 else relay.down()
        time.sleep(0.1)
        relay.up()
    assert tracker.finish("FINISHED", 30)
    assert curve(tmp_path, server.uri) == expected(range(1, 601))


def test_gone_for_good_then_synced(tmp_path: Path, relay: Relay, server: Server):
    relay.up()
    said: list[str] = []
    tracker = Tracker(tmp_path, config(relay.uri), report=said.append)
    tracker.start()
    log(tmp_path, range(1, 21))
    tracker.notice()
    until(lambda: (tmp_path / "mlflow_run_id").exists() and len(curve(tmp_path, server.uri)) == 20)
    relay.down()
    log(tmp_path, range(21, 41))
    (tmp_path / "summary.json").write_text("{}")
    assert not tracker.finish("FINISHED", 0.5)
    assert f"`vitscale sync {tmp_path}`" in said[-1]
    assert not sync(tmp_path, config(relay.uri), said.append)
    assert "nothing is lost" in said[-1]

    relay.up()
    for _ in range(2):
        assert sync(tmp_path, config(relay.uri), said.append)
        assert curve(tmp_path, server.uri) == expected(range(1, 41))
        assert status(tmp_path, server.uri) == "FINISHED"
    assert [file.path for file in MlflowClient(server.uri).list_artifacts(run_id(tmp_path))] == ["summary.json"]


def test_a_server_that_hangs_holds_up_nothing(tmp_path: Path, relay: Relay, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "500")  # whoever waited for it would be missed
    relay.hanging()
    tracker = Tracker(tmp_path, config(relay.uri), report=lambda text: None)
    began = time.monotonic()
    tracker.start()
    until(lambda: relay.accepted > 0)
    log(tmp_path, range(1, 100))
    tracker.notice()
    assert not tracker.finish("KILLED", 0.5)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("lost", ["some", "all"])
def test_a_server_that_lost_rows_gets_them_again(tmp_path: Path, relay: Relay, server: Server, lost: str):
    relay.up()
    said: list[str] = []
    tracker = Tracker(tmp_path, config(relay.uri), report=said.append)
    tracker.start()
    log(tmp_path, range(1, 21))
    tracker.notice()
    until(lambda: (tmp_path / "mlflow_run_id").exists() and len(curve(tmp_path, server.uri)) == 20)
    relay.down()
    log(tmp_path, range(21, 31))
    tracker.notice()
    until(lambda: len(said) == 1)
    if lost == "all":
        MlflowClient(server.uri).delete_run(run_id(tmp_path))
    else:
        with contextlib.closing(sqlite3.connect(server.database)) as database, database:
            for change in ("DELETE FROM metrics", "UPDATE latest_metrics SET step = 10"):
                database.execute(f"{change} WHERE run_uuid = ? AND step > 10", [run_id(tmp_path)])
    relay.up()
    assert tracker.finish("FINISHED", 30)
    assert curve(tmp_path, server.uri) == expected(range(1, 31))
