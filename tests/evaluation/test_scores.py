"""Scores of features: real digits, and labels that do not serve."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

from vitscale.errors import DataError
from vitscale.evaluation.features import standardize
from vitscale.evaluation.linear_probe import linear_probe_predict
from vitscale.evaluation.scores import score_features


def digits(train: int = 600, test: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32)
    return images[:train], labels[:train], images[-test:], labels[-test:]


def test_raw_digits_score_as_they_should() -> None:
    scores = score_features(*digits(), neighbours=20)
    assert 0.85 < scores["linear_probe"] < 0.98
    assert 0.85 < scores["knn"] < 0.98
    for name in ("linear_probe", "knn"):
        assert scores[f"{name}_se"] == pytest.approx(math.sqrt(scores[name] * (1 - scores[name]) / 300))


def test_features_without_the_labels_score_as_chance() -> None:
    train_x, train_y, test_x, test_y = digits()
    random = np.random.default_rng(0)
    scores = score_features(random.normal(size=train_x.shape), train_y, random.normal(size=test_x.shape), test_y, 20)
    assert scores["linear_probe"] < 0.2
    assert scores["knn"] < 0.2


def test_linear_probe_separates_what_a_line_can() -> None:
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]], np.float32)
    assert linear_probe_predict(x, np.array([7, 7, 3, 3]), np.array([[-1.5], [1.5]])).tolist() == [7, 3]


def test_standardize_equals_sklearn_and_bears_constants() -> None:
    train, _, test, _ = digits()
    assert (train.std(axis=0) == 0).any()
    scaler = StandardScaler().fit(train)
    for ours, theirs in zip(standardize(train, test), (scaler.transform(train), scaler.transform(test)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_missing_labels_are_named() -> None:
    train_x, train_y, test_x, test_y = digits()
    test_y = test_y.copy()
    test_y[:2] = -1
    with pytest.raises(DataError, match=r"evaluation\.test: 2 of 300 samples have no label"):
        score_features(train_x, train_y, test_x, test_y, 20)
    with pytest.raises(DataError, match="every sample has the label 1"):
        score_features(train_x, np.ones_like(train_y), test_x, np.ones_like(test_y), 20)
