"""kNN against sklearn's, and what it promises besides."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from vitscale.evaluation.knn import knn_predict


def clouds(count: int, seed: int, width: int = 6, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count) * 3  # labels need not be 0, 1, 2, ...
    centers = np.random.default_rng(0).normal(size=(3 * classes, width))
    return (centers[labels] + random.normal(0, 1.2, (count, width))).astype(np.float32), labels


@pytest.mark.parametrize("neighbours", [1, 7, 20])
def test_equals_sklearn(neighbours: int) -> None:
    (train_x, train_y), (test_x, test_y) = clouds(400, 1), clouds(300, 2)
    theirs = KNeighborsClassifier(neighbours, metric="cosine").fit(train_x, train_y).predict(test_x)
    ours = knn_predict(train_x, train_y, test_x, neighbours, batch=64)
    assert np.array_equal(ours, theirs)
    assert (ours == test_y).mean() > 0.4  # chance is 0.2


def test_weighted_vote_equals_sklearn() -> None:
    (train_x, train_y), (test_x, _) = clouds(400, 1), clouds(300, 2)

    def weigh(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    sklearn = KNeighborsClassifier(20, metric="cosine", weights=weigh).fit(train_x, train_y)
    assert np.array_equal(knn_predict(train_x, train_y, test_x, 20, temperature=0.07), sklearn.predict(test_x))


def test_more_neighbours_than_samples_means_all() -> None:
    train_x, train_y = np.eye(3, dtype=np.float32), np.array([4, 9, 9])
    assert knn_predict(train_x, train_y, np.ones((2, 3), np.float32), 50).tolist() == [9, 9]
