"""Figures of frozen features: what they must be on features that are known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from vitscale.evaluation.frozen import STRENGTHS, frozen_scores, spread_of
from vitscale.evaluation.probing import warnings_of


def clouds(
    n: int, classes: int = 4, width: int = 16, noise: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(9).normal(size=(classes, width)) * 2
    labels = random.integers(0, classes, n)
    return (centers[labels] + noise * random.normal(size=(n, width))).astype(np.float16), labels


def test_features_that_tell_and_features_that_do_not() -> None:
    (train, train_y), (test, test_y) = clouds(400), clouds(200, seed=1)
    nothing = np.random.default_rng(2).normal(size=train.shape).astype(np.float16)
    told = frozen_scores({"mean": train}, train_y, {"mean": test}, test_y, 10)
    assert told["linear_probe"] > 0.97
    assert told["knn"] > 0.97
    chance = frozen_scores({"mean": nothing}, train_y, {"mean": nothing[:200]}, test_y, 10)
    assert chance["linear_probe"] < 0.45
    assert chance["knn"] < 0.45
    both = frozen_scores({"mean": nothing, "cls": train}, train_y, {"mean": nothing[:200], "cls": test}, test_y, 10)
    assert both["linear_probe"] == told["linear_probe"], "the better pooling is found on a part of the training set"


def test_the_probe_is_a_ridge_classifier() -> None:
    (train, train_y), (test, test_y) = clouds(500, noise=4.0), clouds(400, noise=4.0, seed=1)
    ours = frozen_scores({"mean": train}, train_y, {"mean": test}, test_y, 10)["linear_probe"]
    fitted = np.arange(500) % 5 != 4
    mean, std = train.astype(np.float32).mean(0), train.astype(np.float32).std(0)
    scale = lambda x: (x.astype(np.float32) - mean) / std  # noqa: E731
    best = max(
        (RidgeClassifier(alpha=400 * strength).fit(scale(train[fitted]), train_y[fitted]) for strength in STRENGTHS),
        key=lambda model: model.score(scale(train[~fitted]), train_y[~fitted]),
    )
    assert ours == pytest.approx(best.score(scale(test), test_y), abs=0.006)
    assert 0.4 < ours < 0.95


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
    (line,) = warnings_of(good | {"rankme": 1.2}, {})
    assert "features have collapsed: rankme 1.2" in line
