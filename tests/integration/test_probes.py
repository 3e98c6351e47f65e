"""Evaluation within pretraining: the same scores on any ranks and stages, and no trace in what follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.worlds import Launcher, losses, rows

NAMES = ("linear_probe", "knn", "rankme", "feature_deviation", "mean_cosine", "dead_dimensions")


@pytest.mark.parametrize("objective", ["mae", "multitask"])
def test_scores_on_any_ranks_and_stages(
    launcher: Launcher, config: Path, shards: Path, tmp_path: Path, objective: str
) -> None:
    argv = ["pretrain", str(config), f"objective.name={objective}", "train.steps=10", "log.every_steps=100"]
    keys = ["evaluation.every_steps=4", f"evaluation.test={shards}/*.tar", f"data.validation={shards}/*.tar"]
    keys += ["evaluation.images=80", "evaluation.batch=16", "evaluation.crop_fraction=1.0"]
    found = []
    for ranks, stage in ((1, 0), (2, 3), (4, 1)):
        name = f"probed-{ranks}"
        sizes = [f"run.name={name}", f"parallel.zero_stage={stage}"]
        launcher.run([*argv, *keys, *sizes], ranks=ranks)
        run = tmp_path / "runs" / name
        baselines = json.loads((run / "baselines.json").read_text())
        assert sorted(baselines) == ["pixels", "untrained"]
        assert (run / "figures" / "reconstructions.png").stat().st_size > 5000
        found.append((rows(run), baselines))
    scored, baselines = found[0]
    assert [row["step"] for row in scored] == [4, 8, 10]
    for other, other_baselines in found[1:]:
        assert len(other) == len(scored)
        for row, theirs in zip(scored, other, strict=True):
            assert theirs["validation/loss"] == pytest.approx(row["validation/loss"], rel=1e-5)
            assert theirs["validation/images"] == row["validation/images"] == 144, "whole chunks of 16 of 150"
            for name in NAMES:
                assert theirs[f"evaluation/{name}"] == pytest.approx(row[f"evaluation/{name}"], rel=1e-3, abs=0.03)
        assert other_baselines["pixels"] == pytest.approx(baselines["pixels"], rel=1e-3, abs=0.03)
    if objective == "mae":
        stage3 = ["parallel.zero_stage=3", "run.name=quiet"]
        launcher.run([*argv, *stage3], ranks=2)
        state = "checkpoints/step_00000010/state-00000.safetensors"
        probed, quiet = (load_file(tmp_path / "runs" / name / state) for name in ("probed-2", "quiet"))
        assert all(torch.equal(probed[name], quiet[name]) for name in quiet), "training is the same bits without it"
        assert losses(tmp_path / "runs" / "quiet")[10] == rows(tmp_path / "runs" / "probed-2")[-1]["loss"]


def test_the_start_is_a_baseline_where_there_is_one(
    launcher: Launcher, config: Path, shards: Path, tmp_path: Path
) -> None:
    argv = ["pretrain", str(config), "train.steps=4"]
    launcher.run([*argv, "run.name=first"])
    keys = ["evaluation.every_epochs=0.5", f"evaluation.test={shards}/*.tar", f"model.init_from={tmp_path}/runs/first"]
    launcher.run([*argv, *keys, "run.name=second"])
    baselines = json.loads((tmp_path / "runs" / "second" / "baselines.json").read_text())
    assert sorted(baselines) == ["pixels", "the start", "untrained"]
    assert baselines["the start"] != baselines["untrained"]
    scored = [row for row in rows(tmp_path / "runs" / "second") if "evaluation/knn" in row]
    assert [row["step"] for row in scored] == [4]
