"""What of a config is planned: the model that the run trains, without its data."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.inference.conftest import save
from vitscale.cli import main
from vitscale.config.load import load_config
from vitscale.errors import ConfigError
from vitscale.models.vit import ViTModel
from vitscale.planning.gpus import GPUS
from vitscale.planning.length import steps_or_missing
from vitscale.planning.plan import Cluster, Planner
from vitscale.planning.recipe import planned_config
from vitscale.run.finetune import complete, sizes_of_encoder
from vitscale.run_folder import BAD_INPUT

CONFIGS = Path(__file__).parents[2] / "configs"
FINETUNE, SUPERVISED = CONFIGS / "finetune_vit_h_mae.yaml", CONFIGS / "pretrain_vit_b_deit3.yaml"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("encoder"), ViTModel, num_attention_heads=2)


def test_a_fine_tuning_is_planned_with_its_encoder(encoder: Path) -> None:
    keys = [f"model.init_from={encoder}", "model.image_size=32", "model.num_labels=7"]
    trained = load_config(FINETUNE, keys, complete)
    planned = planned_config(str(FINETUNE), [*keys, "data.train=nowhere/*.tar"], sizes_of_encoder)
    assert planned.model == trained.model
    assert planned.objective == trained.objective


def test_an_encoder_that_is_not_here_needs_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(FINETUNE), "--gpu", "h100", "--gpus", "8"]) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "model.init_from=runs/vit_h_mae/model: the model's size comes from there" in said
    assert said.endswith("add it, say model.preset=H\n")
    config = planned_config(str(FINETUNE), ["model.preset=S"], sizes_of_encoder)
    assert (config.model.hidden_size, config.objective.name) == (384, "classification")


def test_pretraining_is_what_the_config_says(encoder: Path) -> None:
    keys = [f"model.init_from={encoder}", "objective.name=mae"]
    planned, trained = planned_config(str(FINETUNE), keys, sizes_of_encoder), load_config(FINETUNE, keys)
    assert replace(planned, data=trained.data) == trained


def test_nothing_to_score_on_is_needed() -> None:
    assert load_config(SUPERVISED).train.keep_best is not None
    cluster = Cluster(GPUS["h100"], 8)
    Planner(planned_config(str(SUPERVISED), [], sizes_of_encoder), cluster)
    wrong = planned_config(str(SUPERVISED), ["train.keep_best=validation/top9"], sizes_of_encoder)
    with pytest.raises(ConfigError, match=r"train.keep_best=validation/top9: must be one of validation/loss"):
        Planner(wrong, cluster)


def hours_told(path: Path) -> list[tuple[float, list[str]]]:
    """The hours in a recipe's record that a command gives, and the command's words."""
    text = re.sub(r"\\?\n# *", " ", path.read_text())
    return [(float(hours), words.split()) for hours, words in re.findall(r"([\d.]+) on \d+ \S+, by `(.*?)`", text)]


def test_every_planned_hour_has_its_command() -> None:
    planned = [path for path in CONFIGS.glob("*.yaml") if "vitscale plan" in path.read_text()]
    assert {path.name for path in planned} >= {FINETUNE.name, SUPERVISED.name}
    for path in planned:
        ((_, words),) = hours_told(path)
        assert words[:3] == ["vitscale", "plan", f"configs/{path.name}"]


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml") if hours_told(path)))
def test_hours_of_the_records_are_those_of_the_command(name: str) -> None:
    ((told, words),) = hours_told(CONFIGS / name)
    keys = [word for word in words if "=" in word]
    options = dict(zip(words[3 + len(keys) :: 2], words[4 + len(keys) :: 2], strict=True))
    config = planned_config(str(CONFIGS / name), keys, sizes_of_encoder)
    planner = Planner(config, Cluster(GPUS[options["--gpu"]], int(options["--gpus"])))
    estimate, steps = planner.choice(), steps_or_missing(config, int(options["--images"]))
    assert estimate is not None
    assert isinstance(steps, int)
    assert steps * estimate.step.total / 3600 == pytest.approx(told, rel=0.02)
