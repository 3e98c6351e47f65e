"""kNN against sklearn's, and what it promises besides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from tests.evaluation.tables import clouds, sole, table
from vitscale.evaluation.knn import knn_predict


def predicted(
    folder: Path, train: tuple[np.ndarray, np.ndarray], test_x: np.ndarray, neighbours: int, temperature: float | None
) -> np.ndarray:
    bank, queries = table(folder, train[1], x=train[0]), table(folder, np.zeros(len(test_x), np.int64), x=test_x)
    codes = torch.from_numpy(train[1])
    return knn_predict(bank, codes, queries, "x", neighbours, lambda x: x, sole(), temperature).numpy()


@pytest.mark.parametrize("neighbours", [1, 7, 20])
def test_equals_sklearn(tmp_path: Path, neighbours: int) -> None:
    (train_x, train_y), (test_x, test_y) = clouds(400, noise=4.0, seed=1), clouds(300, noise=4.0, seed=2)
    theirs = KNeighborsClassifier(neighbours, metric="cosine").fit(train_x, train_y).predict(test_x)
    ours = predicted(tmp_path, (train_x, train_y), test_x, neighbours, None)
    assert np.array_equal(ours, theirs)
    assert 0.4 < (ours == test_y).mean() < 0.99  # chance is 0.25


def test_weighted_vote_equals_sklearn(tmp_path: Path) -> None:
    train, (test_x, _) = clouds(400, noise=4.0, seed=1), clouds(300, noise=4.0, seed=2)

    def weigh(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    sklearn = KNeighborsClassifier(20, metric="cosine", weights=weigh).fit(*train)
    assert np.array_equal(predicted(tmp_path, train, test_x, 20, 0.07), sklearn.predict(test_x))


def test_more_neighbours_than_samples_means_all(tmp_path: Path) -> None:
    train = np.eye(3, dtype=np.float32), np.array([0, 2, 2])
    assert predicted(tmp_path, train, np.ones((2, 3), np.float32), 50, None).tolist() == [2, 2]


def test_a_bank_in_chunks_is_one_bank(tmp_path: Path) -> None:
    """More rows than a chunk has: the nearest are those of all chunks."""
    (train_x, train_y), (test_x, _) = clouds(9000, noise=6.0, seed=1), clouds(50, noise=6.0, seed=2)
    theirs = KNeighborsClassifier(15, metric="cosine").fit(train_x, train_y).predict(test_x)
    assert np.array_equal(predicted(tmp_path, (train_x, train_y), test_x, 15, None), theirs)
