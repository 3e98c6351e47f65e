"""Evaluation within pretraining: the same scores on any ranks and stages, and no trace in what follows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import make_images
from tests.integration.worlds import Launcher, losses, rows
from vitscale.prepare.pack import pack

SPREAD = ("rankme", "feature_deviation", "mean_cosine", "dead_dimensions")


def of_features(row: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("evaluation/"): value for name, value in row.items() if name.startswith("evaluation/")}


def assert_same_scores(found: dict[str, float], expected: dict[str, float]) -> None:
    """Accuracies to one image, what features are like to the rounding of float16."""
    images = expected["images"]
    assert found["images"] == images
    for name in ("linear_probe", "knn"):
        assert 0.2 < expected[name] < 0.9, "neither all wrong nor all right"
        assert abs(found[name] - expected[name]) * images <= 1.001, name
    for name in SPREAD:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.fixture(scope="module")
def mixed_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sides of images of which half have another's label: no score of them is 0 or 1."""
    folder = tmp_path_factory.mktemp("mixed-up")
    make_images(folder / "images")
    for path in sorted((folder / "images").glob("*/*.png")):
        if int(path.stem) % 4 < 2:
            path.rename(folder / "images" / f"class{int(path.stem) // 4 % 3}" / path.name)
    pack(folder / "images", folder / "shards", held_out=0.5, workers=1)
    return folder / "shards"


@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), pytest.param(4, 1, marks=pytest.mark.full)])
@pytest.mark.parametrize("objective", ["mae", pytest.param("multitask", marks=pytest.mark.full)])
def test_scores_on_any_ranks_and_stages(
    launcher: Launcher,
    config: Path,
    shards: Path,
    mixed_up: Path,
    tmp_path: Path,
    objective: str,
    ranks: int,
    stage: int,
) -> None:
    argv = ["pretrain", str(config), f"objective.name={objective}", "train.steps=6", "log.every_steps=100"]
    keys = ["evaluation.every_steps=4", f"data.validation={shards}/*.tar"]
    keys += [f"evaluation.{side}={mixed_up}/{side}/*.tar" for side in ("train", "test")]
    keys += ["evaluation.images=60", "evaluation.batch=16", "evaluation.crop_fraction=1.0"]
    found = []
    many = [f"parallel.zero_stage={stage}"]
    for name, size, own in (("one", 1, []), ("many", ranks, many)):
        launcher.run([*argv, *keys, *own, f"run.name={name}"], ranks=size)
        run = tmp_path / "runs" / name
        baselines = json.loads((run / "baselines.json").read_text())
        assert sorted(baselines) == ["of", "pixels", "untrained"]
        assert (run / "figures" / "reconstructions.png").stat().st_size > 5000
        found.append((rows(run), baselines))
    (scored, baselines), (others, other_baselines) = found
    assert [row["step"] for row in scored] == [4, 6]
    for row, theirs in zip(scored, others, strict=True):
        assert theirs["validation/loss"] == pytest.approx(row["validation/loss"], rel=1e-5)
        assert theirs["validation/images"] == row["validation/images"] == 48, "whole chunks of 16 of 59 of 150"
        assert_same_scores(of_features(theirs), of_features(row))
    for name in ("pixels", "untrained"):
        assert_same_scores(other_baselines[name], baselines[name])
    if objective == "mae":
        launcher.run([*argv, *many, "run.name=quiet"], ranks=ranks)
        state = "checkpoints/step_00000006/state-00000.safetensors"
        probed, quiet = (load_file(tmp_path / "runs" / name / state) for name in ("many", "quiet"))
        assert all(torch.equal(probed[name], quiet[name]) for name in quiet), "training is the same bits without it"
        assert losses(tmp_path / "runs" / "quiet")[6] == others[-1]["loss"]


def test_the_start_is_a_baseline_where_there_is_one(
    launcher: Launcher, config: Path, shards: Path, tmp_path: Path
) -> None:
    argv = ["pretrain", str(config), "train.steps=4"]
    launcher.run([*argv, "run.name=first"])
    keys = ["evaluation.every_epochs=0.5", f"evaluation.test={shards}/*.tar", f"model.init_from={tmp_path}/runs/first"]
    launcher.run([*argv, *keys, "run.name=second"])
    baselines = json.loads((tmp_path / "runs" / "second" / "baselines.json").read_text())
    assert sorted(baselines) == ["of", "pixels", "the start", "untrained"]
    assert baselines["the start"] != baselines["untrained"]
    scored = [row for row in rows(tmp_path / "runs" / "second") if "evaluation/knn" in row]
    assert [row["step"] for row in scored] == [4]


@pytest.mark.full
def test_fewer_images_where_seconds_are_few(launcher: Launcher, config: Path, shards: Path, tmp_path: Path) -> None:
    """What evaluation.seconds leaves is found once, and kept by every later start."""
    argv = ["pretrain", str(config), "evaluation.every_steps=2", f"evaluation.test={shards}/*.tar"]
    first = launcher.run([*argv, "train.steps=2", "evaluation.seconds=0.001"])
    assert "150 images took" in first
    assert "100 of each side are scored from here on, by evaluation.seconds=0.001" in first
    baselines = json.loads((tmp_path / "runs" / "run" / "baselines.json").read_text())
    assert baselines.pop("cut to") == {"images": 100}
    assert sorted(baselines) == ["of", "pixels", "untrained"]
    again = launcher.run([*argv, "train.steps=4", "evaluation.seconds=1000"], ranks=2)
    assert "images took" not in again
    images = [row["evaluation/images"] for row in rows(tmp_path / "runs" / "run")[1::2]]
    assert len(images) == 2
    assert len(set(images)) == 1
    assert 80 < images[0] < 120, "chosen by a hash, so about 100"
    other = launcher.run([*argv, "train.steps=6", "evaluation.neighbours=3"])
    assert "baselines are measured anew" in other
    assert json.loads((tmp_path / "runs" / "run" / "baselines.json").read_text()).get("cut to") is None


def evaluated(launcher: Launcher, source: Path, out: Path, *keys: str, ranks: int = 1) -> dict[str, dict[str, float]]:
    launcher.run(["evaluate", str(source), "--out", str(out), *keys], ranks=ranks)
    (row,) = (json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines())
    scores = json.loads((out / "summary.json").read_text())["evaluation"]["scores"]
    assert row["evaluation/linear_probe_folds_trained"] == scores["trained"]["linear_probe_folds"]
    return scores


def test_evaluate_on_any_ranks_and_of_any_model(launcher: Launcher, config: Path, shards: Path, tmp_path: Path) -> None:
    launcher.run(["pretrain", str(config), "train.steps=8", "evaluation.crop_fraction=1.0"])
    run = tmp_path / "runs" / "run"
    sides = [f"evaluation.{side}={shards}/*.tar" for side in ("train", "test")]
    keys = [*sides, "evaluation.batch=16", "evaluation.shots=[1,5]", "evaluation.seeds=3"]
    one, two, four = (evaluated(launcher, run, tmp_path / f"out{n}", *keys, ranks=n) for n in (1, 2, 4))
    assert tuple(one) == ("trained", "untrained", "pixels")
    for other in (two, four):
        for name, scores in one.items():
            assert other[name].keys() == scores.keys()
            assert {"few_shot_1", "few_shot_5_sd", "linear_probe_se", "knn", "rankme"} <= scores.keys()
            for kind, value in scores.items():
                assert other[name][kind] == pytest.approx(value, rel=1e-3, abs=1 / 150 + 1e-6), (name, kind)
    assert one["trained"]["knn"] > 0.5, "every image is among its own neighbours"
    drawn = {path.stem for path in (tmp_path / "out2" / "figures").iterdir()}
    assert drawn == {"loss", "reconstructions", "neighbours", "patches"}
    assert (tmp_path / "out2" / "report.html").exists()
    model = evaluated(launcher, run / "model", tmp_path / "of-model", *keys, "evaluation.crop_fraction=1.0", ranks=2)
    for kind, value in one["trained"].items():
        assert model["trained"][kind] == pytest.approx(value, rel=1e-3, abs=1 / 150 + 1e-6), kind
    alone = evaluated(launcher, run, tmp_path / "alone", sides[0])
    assert alone["trained"].keys() == {f"linear_probe_folds{end}" for end in ("", "_sd", "_se")}
    for kind in alone["trained"]:
        assert alone["trained"][kind] == pytest.approx(one["trained"][kind], abs=1 / 150)
    assert "--out FOLDER" in launcher.run(["evaluate", str(run / "model"), *sides], code=2)
    before = (run / "config.yaml").read_bytes()
    launcher.run(["evaluate", str(run), "--out", str(run), *sides])
    assert (run / "config.yaml").read_bytes() == before, "the run's own folder is as no --out"
    refused = launcher.run(["evaluate", str(run / "model"), "--out", str(run), *sides], code=2)
    assert "is the folder of another run" in refused


def test_a_classifier_scores_what_the_run_scored(
    launcher: Launcher, config: Path, shards: Path, tmp_path: Path
) -> None:
    held_out = [f"data.validation={shards}/*.tar", "objective.name=classification", "train.steps=6"]
    launcher.run(["pretrain", str(config), *held_out, "train.ema_decay=0.5"])
    run = tmp_path / "runs" / "run"
    evaluated(
        launcher, run, tmp_path / "out", *(f"evaluation.{side}={shards}/*.tar" for side in ("train", "test")), ranks=2
    )
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["evaluation"]
    last = rows(run)[-1]
    for name in ("loss", "top1", "balanced_accuracy", "macro_f1"):
        assert found["test_scores"][f"test/{name}"] == pytest.approx(last[f"validation/{name}"], rel=1e-5)
    assert np.array(found["confusion"]).sum() == 150


def test_numbers_as_labels_and_a_single_image(launcher: Launcher, config: Path, shards: Path, tmp_path: Path) -> None:
    """A regression has its own scores and no probes; one test image draws no neighbours and ends nothing."""
    keys = ["objective.name=classification", "model.num_labels=1", f"data.validation={shards}/*.tar", "train.steps=2"]
    launcher.run(["pretrain", str(config), *keys])
    run = tmp_path / "runs" / "run"
    output = launcher.run(["evaluate", str(run), "--out", str(tmp_path / "out")], ranks=2)
    assert "its own: test/loss" in output
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["evaluation"]
    assert found["scores"] == {}
    assert found["test_scores"]["test/mae"] == pytest.approx(rows(run)[-1]["validation/mae"], rel=1e-5)

    launcher.run(["pretrain", str(config), "train.steps=2", "run.name=other"])
    single = make_images(tmp_path / "images") / "class1"
    for path in sorted(single.iterdir())[1:]:
        path.unlink()
    for other in ("class0", "class2"):
        shutil.rmtree(single.parent / other)
    pack(single.parent, tmp_path / "single", workers=1, classes=["class0", "class1", "class2"])
    sides = [f"evaluation.train={shards}/*.tar", f"evaluation.test={tmp_path}/single/*.tar"]
    scores = evaluated(launcher, tmp_path / "runs" / "other", tmp_path / "one", *sides)
    assert scores["trained"]["images"] == 1
    assert {path.stem for path in (tmp_path / "one" / "figures").iterdir()} == {"loss", "patches", "reconstructions"}
