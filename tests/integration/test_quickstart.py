"""launch/quickstart.sh without its installation: digits, two ranks of ZeRO-2, scores, transformers, MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.worlds import ROOT, Launcher, losses, rows
from vitscale.run_folder import BAD_INPUT

FEATURES = ("trained", "untrained", "pixels")


class QuickStart:
    """The commands of launch/quickstart.sh, in a folder of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.data = folder, folder / "runs" / "quickstart", folder / "data"
        hidden = ("SLURM_", "RANK", "NNODES", "RDZV_", "LOCAL_", "WORLD_", "MASTER_", "MLFLOW_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self.environment = {**inherited, "VITSCALE_VENV": sys.prefix, "PYTHONPATH": str(ROOT)}
        self.environment |= {"NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def call(self, *command: str | Path, code: int = 0) -> str:
        """What a command printed; its exit code must be `code`."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def python(self, *arguments: str | Path, code: int = 0) -> str:
        return self.call(sys.executable, "-m", *arguments, code=code)

    def pretrain_argv(self, steps: int) -> list[str]:
        overrides = [f"data.train={self.data}/train/*.tar", f"evaluation.test={self.data}/test/*.tar"]
        overrides += [f"run.dir={self.run.parent}", f"train.steps={steps}", "log.every_steps=1"]
        return ["pretrain", str(ROOT / "configs" / "quickstart.yaml"), *overrides]


@pytest.fixture(scope="module")
def quickstart(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> QuickStart:
    """A run of 6 steps, evaluated."""
    started = QuickStart(tmp_path_factory.mktemp("quickstart"))
    assert "1,437" in started.python("vitscale.prepare.digits", started.data)
    started.call("bash", ROOT / "launch" / "torchrun.sh", *started.pretrain_argv(6))
    table = launcher.run(["evaluate", str(started.run)])
    for name in FEATURES:
        assert sum(line.startswith(name) for line in table.splitlines()) == 1, table
    return started


def test_digits_are_written_once(quickstart: QuickStart) -> None:
    assert "there already" in quickstart.python("vitscale.prepare.digits", quickstart.data)
    (quickstart.folder / "taken").mkdir()
    (quickstart.folder / "taken" / "file").touch()
    output = quickstart.python("vitscale.prepare.digits", quickstart.folder / "taken", code=BAD_INPUT)
    assert output.startswith("vitscale: error: ")
    assert output.count("\n") == 1


def test_curves_and_scores(quickstart: QuickStart) -> None:
    curve = losses(quickstart.run)
    assert list(curve) == list(range(1, 7))
    assert curve[6] < curve[1]
    summary = json.loads((quickstart.run / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"], summary["zero_stage"]) == (6, 2, 2)
    evaluation = summary["evaluation"]
    assert (evaluation["train"], evaluation["test"]) == (1437, 360)
    assert tuple(evaluation["scores"]) == FEATURES
    for name, scores in evaluation["scores"].items():
        assert {"linear_probe", "knn"} <= scores.keys()
        assert all(0 <= score <= 1 for kind, score in scores.items() if kind.startswith(("linear", "knn", "few"))), name
    assert evaluation["scores"]["pixels"]["knn"] > 0.9  # digits are easy: else labels and images do not belong together
    assert evaluation["scores"]["untrained"]["linear_probe"] > 0.3  # three times chance


@pytest.mark.parametrize("name", ["loss.png", "reconstructions.png"])
def test_figures_show_something(quickstart: QuickStart, name: str) -> None:
    with Image.open(quickstart.run / "figures" / name) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 200
    assert pixels.std() > 3
    assert (pixels < 100).mean() > 0.001


def test_transformers_opens_the_model(quickstart: QuickStart) -> None:
    import torch
    from transformers import AutoModelForPreTraining

    model, info = AutoModelForPreTraining.from_pretrained(quickstart.run / "model", output_loading_info=True)
    assert type(model).__name__ == "ViTMAEForPreTraining"
    assert not any(info.values()), info
    assert (model.config.image_size, model.config.num_channels, model.config.hidden_size) == (8, 1, 96)
    with torch.inference_mode():
        output = model(pixel_values=torch.zeros(2, 1, 8, 8))
    assert torch.isfinite(output.loss)


def test_mlflow_has_it_all(quickstart: QuickStart) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{quickstart.run / 'mlflow.db'}")
    run = client.get_run((quickstart.run / "mlflow_run_id").read_text().strip())
    assert (run.info.status, run.info.run_name) == ("FINISHED", "quickstart")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {point.step: point.value for point in history} == losses(quickstart.run)
    scores = json.loads((quickstart.run / "summary.json").read_text())["evaluation"]["scores"]
    wanted = {f"evaluation/{kind}_{name}": scores[name][kind] for name in FEATURES for kind in ("linear_probe", "knn")}
    assert {name: value for name, value in run.data.metrics.items() if name in wanted} == wanted
    figures = {item.path for item in client.list_artifacts(run.info.run_id, "figures")}
    assert figures == {f"figures/{name}.png" for name in ("loss", "reconstructions", "neighbours", "patches")}
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "summary.json", "report.html"} <= files


def test_same_command_is_done_and_more_steps_go_on(quickstart: QuickStart, launcher: Launcher) -> None:
    before = {name: (quickstart.run / name).read_bytes() for name in ("metrics.jsonl", "summary.json")}
    assert "done: step 6 of 6" in launcher.run(quickstart.pretrain_argv(6), ranks=2)
    assert {name: (quickstart.run / name).read_bytes() for name in before} == before

    output = launcher.run(quickstart.pretrain_argv(8), ranks=2)
    assert "step_00000006" in output
    assert "Warning" not in output
    assert list(losses(quickstart.run)) == list(range(1, 9))
    assert rows(quickstart.run)[:6] == [json.loads(line) for line in before["metrics.jsonl"].splitlines()]
    assert json.loads((quickstart.run / "summary.json").read_text())["steps"] == 8
    assert json.loads((quickstart.run / "exit.json").read_text())["code"] == 0
