"""The linear classifiers against sklearn's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from tests.evaluation.tables import CPU, clouds, sole, table
from vitscale.evaluation.linear_probe import Moments, logistic, ridge


def moments_of(features: np.ndarray, labels: np.ndarray, classes: int = 4) -> Moments:
    moments = Moments.zero(classes, features.shape[1], CPU)
    for rows in np.array_split(np.arange(len(labels)), 3):
        moments.add(torch.from_numpy(features[rows]), torch.from_numpy(labels[rows]))
    return moments


def scaled(fitted: np.ndarray, features: np.ndarray) -> np.ndarray:
    return StandardScaler().fit(fitted.astype(np.float64)).transform(features.astype(np.float64))


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_ridge_is_sklearns(strength: float) -> None:
    (train, train_y), (test, _) = clouds(500, noise=4.0), clouds(400, noise=4.0, seed=1)
    (ours,) = ridge(moments_of(train, train_y), [strength])
    theirs = RidgeClassifier(alpha=500 * strength).fit(scaled(train, train), train_y)
    np.testing.assert_allclose(ours.weights.T, theirs.coef_, rtol=1e-6, atol=1e-9)
    answers = ours.predict(torch.from_numpy(test.astype(np.float32))).numpy()
    assert np.array_equal(answers, theirs.predict(scaled(train, test)))


def test_what_is_taken_away_was_never_there() -> None:
    """The classifier of a cross-validation's fold."""
    (train, train_y), fold = clouds(300, noise=4.0), np.arange(300) % 3 == 0
    (left,) = ridge(moments_of(train, train_y) - moments_of(train[fold], train_y[fold]), [0.1])
    (fitted,) = ridge(moments_of(train[~fold], train_y[~fold]), [0.1])
    torch.testing.assert_close(left.weights, fitted.weights, rtol=1e-9, atol=1e-12)


def test_logistic_regression_is_sklearns(tmp_path: Path) -> None:
    (train, train_y), (test, _) = clouds(500, noise=4.0), clouds(400, noise=4.0, seed=1)
    fitted = np.arange(500) % 5 != 0
    features = table(tmp_path, train_y, x=train)
    classifiers = logistic(
        features,
        "x",
        torch.from_numpy(train_y),
        fitted,
        moments_of(train[fitted], train_y[fitted]),
        [1e-1, 1e-3],
        sole(),
    )
    for ours, strength in zip(classifiers, (1e-1, 1e-3), strict=True):
        own = scaled(train[fitted], train[fitted])
        theirs = LogisticRegression(C=1 / (400 * strength), max_iter=2000, tol=1e-8).fit(own, train_y[fitted])
        np.testing.assert_allclose(ours.weights.T, theirs.coef_, rtol=0.01, atol=2e-3)
        answers = ours.predict(torch.from_numpy(test.astype(np.float32))).numpy()
        assert (answers != theirs.predict(scaled(train[fitted], test))).sum() <= 1


def test_constant_features_are_borne() -> None:
    train, train_y = clouds(200)
    train[:, 3] = 7
    (ours,) = ridge(moments_of(train, train_y), [1e-4])
    assert torch.isfinite(ours.weights).all()
    assert ours.weights[3].abs().max() < 1e-9 < ours.weights.abs().max()
