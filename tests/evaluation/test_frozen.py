"""Figures of frozen features: what they must be on features that are known."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from tests.evaluation.tables import CPU, clouds, sole, table
from vitscale.config.schema import Evaluation
from vitscale.errors import DataError
from vitscale.evaluation.features import FeatureTable
from vitscale.evaluation.frozen import frozen_scores, spread_of
from vitscale.evaluation.linear_probe import STRENGTHS
from vitscale.evaluation.probing import warnings_of


def scores(folder: Path, train: Any, train_y: Any, test: Any, test_y: Any, **options: Any) -> dict[str, float]:
    sides = table(folder, train_y, **train), table(folder, test_y, **test)
    evaluation = Evaluation(neighbours=10, **options)
    return frozen_scores(*sides, tuple(train), evaluation, sole(), CPU, shots=(1, 10))


def test_features_that_tell_and_features_that_do_not(tmp_path: Path) -> None:
    (train, train_y), (test, test_y) = clouds(400), clouds(200, seed=1)
    nothing = np.random.default_rng(2).normal(size=train.shape).astype(np.float16)
    told = scores(tmp_path, {"mean": train}, train_y, {"mean": test}, test_y)
    for name in ("linear_probe", "knn", "linear_probe_folds", "few_shot_10"):
        assert told[name] > 0.97
    assert told["few_shot_1"] > 0.5
    assert told["few_shot_1_sd"] > told["few_shot_10_sd"]
    chance = scores(tmp_path, {"mean": nothing}, train_y, {"mean": nothing[:200]}, test_y)
    for name in ("linear_probe", "knn", "linear_probe_folds", "few_shot_10"):
        assert chance[name] < 0.45
    both = scores(tmp_path, {"mean": nothing, "cls": train}, train_y, {"mean": nothing[:200], "cls": test}, test_y)
    assert both["linear_probe"] == told["linear_probe"], "the better pooling is found by cross-validation"


def test_cross_validation_is_sklearns(tmp_path: Path) -> None:
    """The mean over the folds of ridge classifiers fitted on the others, at the strength that does best."""
    (train, train_y), (test, test_y) = clouds(500, noise=5.0), clouds(400, noise=5.0, seed=1)
    ours = scores(tmp_path, {"mean": train}, train_y, {"mean": test}, test_y, folds=3)
    from vitscale import rng

    fold = (rng.uniform(np.arange(500), "fold", 1)[:, 0] * 3).astype(int)
    assert set(np.bincount(fold) > 100) == {True}
    theirs = []
    for strength in STRENGTHS["ridge"]:
        accuracies = []
        for number in range(3):
            fitted, asked = train[fold != number].astype(np.float64), train[fold == number].astype(np.float64)
            scaler = StandardScaler().fit(fitted)
            model = RidgeClassifier(alpha=len(fitted) * strength).fit(scaler.transform(fitted), train_y[fold != number])
            accuracies.append(model.score(scaler.transform(asked), train_y[fold == number]))
        theirs.append((float(np.mean(accuracies)), float(np.std(accuracies, ddof=1))))
    assert (ours["linear_probe_folds"], ours["linear_probe_folds_sd"]) == pytest.approx(max(theirs), abs=0.004)
    assert 0.4 < ours["linear_probe_folds"] < 0.95
    assert ours["linear_probe_se"] == pytest.approx(np.sqrt(ours["linear_probe"] * (1 - ours["linear_probe"]) / 400))


def test_without_held_out_images_cross_validation_is_all(tmp_path: Path) -> None:
    train, train_y = clouds(300)
    told = frozen_scores(table(tmp_path, train_y, mean=train), None, ("mean",), Evaluation(), sole(), CPU)
    assert told.keys() == {"linear_probe_folds", "linear_probe_folds_sd", "linear_probe_folds_se"}


def test_logistic_regression_is_a_choice(tmp_path: Path) -> None:
    (train, train_y), (test, test_y) = clouds(400, noise=2.0), clouds(200, noise=2.0, seed=1)
    told = scores(tmp_path, {"mean": train}, train_y, {"mean": test}, test_y, probe="logistic", folds=3)
    assert told["linear_probe"] > 0.9
    assert told["linear_probe_folds"] > 0.9
    assert told["linear_probe_folds_sd"] > 0


def test_labels_that_do_not_serve(tmp_path: Path) -> None:
    train, train_y = clouds(20)
    with pytest.raises(DataError, match=r"evaluation\.train: 20 labelled images of 1 class"):
        scores(tmp_path, {"mean": train}, np.zeros_like(train_y), {"mean": train}, train_y)
    with pytest.raises(DataError, match=r"evaluation\.test: no labelled image could be read"):
        scores(tmp_path, {"mean": train}, train_y, {"mean": train[:0]}, train_y[:0])


def test_a_class_that_was_never_fitted_is_never_told(tmp_path: Path) -> None:
    train, train_y = clouds(200)
    told = scores(tmp_path, {"mean": train}, 5 + train_y, {"mean": train}, np.where(train_y == 0, 99, 5 + train_y))
    assert told["linear_probe"] == pytest.approx((train_y != 0).mean(), abs=0.02)
    assert told["knn"] == pytest.approx((train_y != 0).mean(), abs=0.02)


def test_few_labels_are_not_scored_where_a_class_has_fewer(tmp_path: Path) -> None:
    train, train_y = clouds(60)
    few = (train_y != 0) | (np.cumsum(train_y == 0) <= 4)  # of class 0 four
    told = scores(tmp_path, {"mean": train[few]}, train_y[few], {"mean": train}, train_y)
    assert "few_shot_1" in told
    assert "few_shot_10" not in told
    with pytest.raises(DataError, match="none of its labels is one of"):
        scores(tmp_path, {"mean": train}, train_y, {"mean": train}, train_y + 100)


def test_spread() -> None:
    random = np.random.default_rng(0)
    wide = spread_of(random.normal(size=(2000, 32)))
    assert 30 < wide["rankme"] <= 32.1
    assert wide["feature_deviation"] == pytest.approx(1, abs=0.03)
    assert wide["mean_cosine"] == pytest.approx(0, abs=0.01)
    assert wide["dead_dimensions"] == 0
    one_point = spread_of(np.ones((100, 8)) + 1e-4 * random.normal(size=(100, 8)))
    assert one_point["rankme"] < 1.1
    assert one_point["feature_deviation"] < 0.001
    assert one_point["mean_cosine"] == pytest.approx(1, abs=1e-4)
    half = random.normal(size=(500, 8))
    half[:, :2] = 3
    assert spread_of(half)["dead_dimensions"] == 0.25
    assert spread_of(np.zeros((5, 3)))["feature_deviation"] == 0


def test_what_is_said_of_bad_features() -> None:
    good = {"linear_probe": 0.9, "knn": 0.8, "rankme": 40.0, "feature_deviation": 0.7}
    assert warnings_of(good, {"untrained": good | {"knn": 0.7}}) == []
    (line,) = warnings_of(good, {"untrained": good | {"knn": 0.85}})
    assert "features are worse than untrained: knn 0.800 (there 0.850)" in line
    assert warnings_of(good | {"rankme": 1.2}, {"untrained": good | {"knn": 0.7}}) == [], "a large mean alone"
    lines = warnings_of(good | {"rankme": 1.2}, {"untrained": good | {"linear_probe": 0.95}})
    assert "features have collapsed: rankme 1.2" in lines[-1]


def test_features_need_no_memory(tmp_path: Path) -> None:
    """Twice 77 MB of features are scored in a part of that, read from the process: they lie in files."""
    count, width = 300_000, 128
    labels = np.arange(count) % 10
    features = FeatureTable(tmp_path, count)
    for rows in np.array_split(np.arange(count), 100):
        values = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(int(rows[0])))
        features.append(rows, labels[rows], {"mean": values, "cls": values * 2})
    test, test_y = clouds(50, classes=10, width=width)
    before, peak, done = _anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    frozen_scores(
        features, table(tmp_path, test_y, mean=test, cls=test), ("mean", "cls"), Evaluation(), sole(), CPU, (10,)
    )
    done.set()
    watcher.join()
    assert peak[0] - before < 70_000_000, f"{peak[0] - before:,} bytes more for {2 * 2 * count * width:,} of features"


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
