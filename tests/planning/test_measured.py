"""`vitscale plan --measured FILE`: steps planned by a step that `vitscale bench step` measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vitscale.bench import step
from vitscale.bench.peers import run_config
from vitscale.cli import main
from vitscale.config.schema import RunConfig, Train
from vitscale.errors import ConfigError
from vitscale.planning.gpus import GPUS
from vitscale.planning.measured import calibration
from vitscale.planning.plan import Cluster, Planner
from vitscale.run_folder import DONE

RECIPE = Path(__file__).parents[2] / "configs" / "pretrain_vit_b_mae.yaml"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = "--preset Ti --batch 2 --rounds 1 --device cpu --peak 0.5 --objective classification"
    written = tmp_path_factory.mktemp("measured") / "step.json"
    written.write_text(json.dumps(step.measure(words.split(), only={"vitscale eager"})))
    return written


def config_of(batch: int = 2, **train: Any) -> RunConfig:
    keys: dict[str, Any] = {"precision": "fp32", "micro_batch": batch, "global_batch": batch, "steps": 1}
    return replace(run_config("Ti", "classification"), train=Train(**keys | train))


def test_the_measured_step_is_planned_as_measured(file: Path) -> None:
    gpu, config = GPUS["l40s"], config_of()
    found = calibration(file, config, gpu)
    seconds = json.loads(file.read_text())["contenders"]["vitscale eager"]["seconds"]
    assert [found["seconds"]] == pytest.approx(seconds)
    as_it_is, measured = (Planner(config, Cluster(each, 1)).estimate(config).step
                          for each in (gpu, replace(gpu, step_ratio=found["ratio"])))  # fmt: skip
    assert replace(measured, augment=0.0).total == pytest.approx(found["seconds"])
    assert measured.augment == as_it_is.augment, "which was not in what was measured"
    assert calibration(file, config_of(batch=64), gpu) == found


def test_the_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(RECIPE), "model.preset=Ti", "train.precision=fp32", "train.compile=false", "--gpu", "h200"]
    words += ["--gpus", "1", "train.global_batch=64", "train.micro_batch=32"]
    found = []
    for more in ([], ["--measured", str(file)]):
        assert main([*words, *more, "--json"]) == DONE
        found.append(json.loads(capsys.readouterr().out))
    plain, measured = found
    assert plain["measured"] is None
    ratio = measured["measured"]["ratio"]
    assert measured["step_seconds"]["matrix"] == pytest.approx(ratio * plain["step_seconds"]["matrix"])
    assert main([*words, "--measured", str(file)]) == DONE
    said = capsys.readouterr().out
    assert f"calibrated by {file}: vitscale eager, classification, ViT-Ti, batch 2, fp32, on " in said
    assert f"times {ratio:.3g}\n" in said


@pytest.mark.parametrize(("text", "says"), [
    ("{", r"must be what `vitscale bench step --json FILE` writes \(JSONDecodeError: "),
    ("[1]", "must be what .* writes"),
    ("{}", r"must be what .* writes \(KeyError: 'bench'\)"),
    ('{"bench": "data"}', "must be what .* writes .*it is of `vitscale bench data`"),
    ('{"bench": "step", "contenders": {}}', r"must be what .* writes \(KeyError: 'objective'\)"),
])  # fmt: skip
def test_other_files_are_refused(text: str, says: str, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(text)
    with pytest.raises(ConfigError, match=says):
        calibration(other, config_of(), GPUS["h200"])
    with pytest.raises(ConfigError, match=r"nowhere.json: must be what .* writes .*No such file"):
        calibration(tmp_path / "nowhere.json", config_of(), GPUS["h200"])


@pytest.mark.parametrize(("train", "says"), [
    ({"precision": "bf16"}, "is of fp32, and train.precision=bf16; measure it by `.* --precision bf16 "),
    ({"compile": True}, "has no row 'vitscale compiled', as train.compile=true .*has vitscale eager.*--compile --json"),
    ({"compile": True, "cuda_graphs": True}, "has no row 'vitscale by CUDA graphs'"),
])  # fmt: skip
def test_a_step_of_another_kind_is_refused(train: dict[str, Any], says: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        calibration(file, config_of(**train), GPUS["h200"])
