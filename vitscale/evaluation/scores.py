"""How well frozen features tell the labels: the same figures for any features."""

from __future__ import annotations

import math

import numpy as np

from vitscale.errors import DataError
from vitscale.evaluation.features import standardize
from vitscale.evaluation.knn import knn_predict
from vitscale.evaluation.linear_probe import linear_probe_predict


def score_features(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, neighbours: int
) -> dict[str, float]:
    """Accuracy on `test` of a linear probe and of kNN (plain vote), with one standard error each.

    Features [n, width] are standardized by the train set's statistics first. Keys: linear_probe,
    linear_probe_se, knn, knn_se.
    """
    _check_labels("train", train_y)
    _check_labels("test", test_y)
    train_x, test_x = standardize(train_x, test_x)
    scores: dict[str, float] = {}
    for name, predicted in (
        ("linear_probe", linear_probe_predict(train_x, train_y, test_x)),
        ("knn", knn_predict(train_x, train_y, test_x, neighbours)),
    ):
        accuracy = float((predicted == test_y).mean())
        scores |= {name: accuracy, f"{name}_se": math.sqrt(accuracy * (1 - accuracy) / len(test_y))}
    return scores


def _check_labels(which: str, labels: np.ndarray) -> None:
    missing = int((labels < 0).sum())
    if missing or not len(labels):
        raise DataError(
            f"evaluation.{which}: {missing} of {len(labels)} samples have no label; features are scored on labelled "
            "samples: give shards with a member named by data.label"
        )
    if which == "train" and len(np.unique(labels)) < 2:
        raise DataError(f"evaluation.train: every sample has the label {labels[0]}; a classifier needs at least two")
