"""Every option of the ViT in a run: alike on any ranks and ZeRO stage, saved, and gone on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.integration.worlds import Launcher, losses, weights
from vitscale.run_folder import BAD_INPUT

OPTIONS = [
    "model.use_cls_token=false", "model.pooling=mean", "model.num_register_tokens=2", "model.rope_theta=100",
    "model.position_embeddings=none", "model.layer_scale_init_value=0.1", "model.qk_norm=true", "model.swiglu=true",
    "model.drop_path_rate=0.2", "train.steps=4", "train.micro_batch=8",
]  # fmt: skip


@pytest.mark.parametrize(("objective", "stage"), [("mae", 3), ("simmim", 2), ("classification", 3), ("multitask", 1)])
def test_ranks_and_stages_agree(launcher: Launcher, config: Path, tmp_path: Path, objective: str, stage: int) -> None:
    argv = ["pretrain", str(config), *OPTIONS, f"objective.name={objective}"]
    if objective == "classification":
        argv.append("model.fc_norm=true")
    launcher.run([*argv, "run.name=one"])
    launcher.run([*argv, "run.name=two", f"parallel.zero_stage={stage}"], ranks=2)
    one, two = losses(tmp_path / "runs" / "one"), losses(tmp_path / "runs" / "two")
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-5)
    content = json.loads((tmp_path / "runs" / "two" / "model" / "config.json").read_text())
    kind = "vitscale_vit_mae" if objective == "mae" else "vitscale_vit"
    assert (content["model_type"], content["rope_theta"]) == (kind, 100.0)


def test_going_on_and_another_architecture(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    argv = ["pretrain", str(config), *OPTIONS, "checkpoint.every_steps=2", "checkpoint.asynchronous=false"]
    launcher.run(argv)
    run = tmp_path / "runs" / "run"
    whole = weights(run)
    assert any("layer_scale_before" in name for name in whole)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    launcher.run(argv)
    for name, value in weights(run).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)
    output = launcher.run([*argv, "train.steps=6", "model.qk_norm=false"], code=BAD_INPUT)
    assert "model.qk_norm (saved True, here None)" in output


def test_whole_numbers_as_quantities(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """One label: the loss is the squared error, and no label is too large to be one."""
    argv = ["pretrain", str(config), "objective.name=classification", "model.num_labels=1", "train.steps=3"]
    launcher.run([*argv, "optimizer.lr=0"])
    values = losses(tmp_path / "runs" / "run")
    assert len(values) == 3
    assert all(0.5 < value < 100 for value in values.values())
    assert not (tmp_path / "runs" / "run" / "quarantine.jsonl").exists()


def test_classes_get_their_names_from_beside_the_shards(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    argv = ["pretrain", str(config), "objective.name=classification", "train.steps=2"]
    launcher.run(argv)
    launcher.run([*argv, "run.name=two", "model.num_labels=5"])  # then the names would be of other classes
    one, two = (json.loads((tmp_path / "runs" / name / "model" / "config.json").read_text()) for name in ("run", "two"))
    assert one["id2label"] == {"0": "class0", "1": "class1", "2": "class2"}
    assert "class1" not in str(two)
