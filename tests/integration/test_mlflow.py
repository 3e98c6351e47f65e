"""A real run and a real MLflow server that comes and goes."""

from __future__ import annotations

import json
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_resume import signal_at_step
from tests.integration.worlds import Launcher, rows
from tests.tracking.conftest import Relay, Server, _mlflow_settings, relay, server  # noqa: F401 - fixtures
from vitscale.run_folder import STOPPED

KNN, SPREAD = "evaluation/knn_trained", "evaluation/feature_deviation_trained"


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
    # It may have stopped before MLflow was first asked, which is told otherwise (tests/tracking/test_tracker.py).
    assert "has not got everything of this run" in world.output()

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


def test_pretraining_fine_tuning_and_scores_lie_below_each_other(
    launcher: Launcher,
    config: Path,
    shards: Path,
    tmp_path: Path,
    server: Server,  # noqa: F811
) -> None:
    """Each kept checkpoint is a model there with its row's metrics; the trained one classifies images."""
    from mlflow.tracking import MlflowClient

    keys = ["tracking.mlflow=true", f"tracking.mlflow_uri={server.uri}", "tracking.experiment=nested"]
    short = ["train.steps=6", "checkpoint.every_steps=2", "checkpoint.keep=2", "checkpoint.asynchronous=false"]
    launcher.run(["pretrain", str(config), *keys, *short, "run.name=first"])
    first, second, scores = (tmp_path / "runs" / "first", tmp_path / "runs" / "second", tmp_path / "scores")
    held_out = [f"data.validation={shards}/*.tar", "train.keep_best=validation/top1", "evaluation.every_steps=3"]
    launcher.run(["finetune", str(config), *keys, *short, "run.name=second", f"model.init_from={first}", *held_out])
    sides = [f"evaluation.{side}={shards}/*.tar" for side in ("train", "test")]
    launcher.run(["evaluate", str(second), "--out", str(scores), *sides])

    client = MlflowClient(server.uri)
    ids = [(folder / "mlflow_run_id").read_text().strip() for folder in (first, second, scores)]
    runs = [client.get_run(each) for each in ids]
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    parents = [run.data.tags.get("mlflow.parentRunId") for run in runs]
    assert parents == [None, ids[0], ids[1]]
    assert runs[1].data.tags["vitscale.parent_run"] == runs[1].data.tags["vitscale.parent_checkpoint"] == str(first)
    assert runs[1].data.tags["vitscale.objective"] == "classification"
    assert runs[0].data.tags["vitscale.data"] == runs[1].data.tags["vitscale.data"]
    assert runs[2].data.metrics[KNN] > 0.5

    assert runs[2].data.tags["vitscale.parent_checkpoint"] == str(second)
    assert "vitscale.data" in runs[2].data.tags
    launcher.run(["evaluate", str(second), "--out", str(scores), *sides, "evaluation.crop_fraction=0.5"])
    again = client.get_run(ids[2]).data.metrics[SPREAD]
    assert again == rows(scores, "evaluation.jsonl")[1][SPREAD] != runs[2].data.metrics[SPREAD]

    models = {model.name: model for model in client.search_logged_models([runs[0].info.experiment_id])}
    kept = {f"second-step-{path.name.removeprefix('step_').lstrip('0')}" for path in (second / "checkpoints").iterdir()}
    assert models.keys() == {"first-step-4", "first-step-6", "first", *kept, "second"}
    assert all(model.status == "READY" for model in models.values())
    best = json.loads((second / "summary.json").read_text())["best"]
    metrics = {metric.key: metric.value for metric in models["second"].metrics}
    assert metrics["validation/top1"] == best["value"]
    assert models["second"].source_run_id == ids[1]
    assert rows(first)[3]["loss"] in [metric.value for metric in models["first-step-4"].metrics]

    labels = predictions(server.uri, models["second"].model_id, shards)
    right = [(labelled[0]["label"] == f"class{label}") for labelled, label in labels]
    assert sum(right) / len(right) == pytest.approx(best["value"], abs=0.35), "a part of the images, cropped otherwise"
    assert [len(labelled) for labelled, _ in labels] == [3] * len(labels)


def predictions(uri: str, model_id: str, shards: Path) -> list[tuple[list[dict[str, Any]], int]]:
    """(what the model on the server says, the label) of the images of a shard."""
    import mlflow
    import pandas

    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(sorted(shards.glob("*.tar"))[0]) as tar:
        for member in tar.getmembers():
            key, _, kind = member.name.partition(".")
            samples.setdefault(key, {})[kind] = tar.extractfile(member).read()  # type: ignore[union-attr]
    images = [sample["png"] for sample in samples.values()]
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(f"models:/{model_id}")
    labels = model.predict(pandas.DataFrame({"image": images}))
    return list(zip(labels, (int(sample["cls"]) for sample in samples.values()), strict=True))
