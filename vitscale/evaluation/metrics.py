"""Scores of predictions: fractions, errors and losses by problem type, from logits and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import metrics

MOST_SHOWN = 200  # classes of a confusion matrix


def scores_of(kind: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """By transformers' problem_type; logits float32 [n, classes]; labels int64 [n] or float32 like logits.

    single_label_classification: loss (cross-entropy), top1, top5, balanced_accuracy, macro_f1, auc (the mean over
    classes of each against the rest); multi_label_classification: loss (binary cross-entropy), map (the mean over
    classes of the average precision), macro_f1 at 0.5, auc; regression: loss and mse, mae, r2. A mean over classes is
    over those that are there; what cannot be told is left out.
    """
    if kind == "single_label_classification":
        return _of_classes(logits, labels)
    if kind == "multi_label_classification":
        return _of_many_labels(logits, labels)
    mse = float(metrics.mean_squared_error(labels, logits))
    r2 = {} if len(labels) < 2 else {"r2": float(metrics.r2_score(labels, logits))}
    return {"loss": mse, "mse": mse, "mae": float(metrics.mean_absolute_error(labels, logits)), **r2}


def _of_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    predicted, classes = logits.argmax(axis=1), logits.shape[1]
    largest, total = _sums_of_softmax(logits)
    of_labels = logits[np.arange(len(labels)), labels] - largest
    scores = {"loss": float(np.mean(np.log(total) - of_labels)), "top1": float((predicted == labels).mean())}
    if classes > 5:
        best = np.argpartition(-logits, 5, axis=1)[:, :5]
        scores["top5"] = float((best == labels[:, None]).any(axis=1).mean())
    present = np.unique(labels)
    recalls = [float((predicted[labels == each] == each).mean()) for each in present]
    scores["balanced_accuracy"] = float(np.mean(recalls))
    scores["macro_f1"] = float(metrics.f1_score(labels, predicted, labels=present, average="macro", zero_division=0))
    shares = (np.exp(column - largest) / total for column in logits.T)
    return scores | _auc(shares, (labels == each for each in range(classes)))


def _sums_of_softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n]: each image's largest logit, and the sum of the exponentials of all less that one. Class by class, as
    no copy of ImageNet's logits in float64 is to be made."""
    largest, total = logits.max(axis=1).astype(np.float64), np.zeros(len(logits))
    for column in logits.T:
        total += np.exp(column - largest)
    return largest, total


def _of_many_labels(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits).double(), torch.from_numpy(labels).double())
    truth = labels >= 0.5
    present = truth.any(axis=0)
    scores = {"loss": float(loss)}
    if present.any():
        precisions = [metrics.average_precision_score(truth[:, k], logits[:, k]) for k in np.flatnonzero(present)]
        scores["map"] = float(np.mean(precisions))
        chosen = truth[:, present], logits[:, present] > 0
        scores["macro_f1"] = float(metrics.f1_score(*chosen, average="macro", zero_division=0))
    return scores | _auc(logits.T, truth.T)


def _auc(ranked: Iterable[np.ndarray], truth: Iterable[np.ndarray]) -> dict[str, float]:
    """By class, [n] each: what images are ordered by, and which are of it."""
    pairs = zip(ranked, truth, strict=True)
    areas = [_area(order, is_one) for order, is_one in pairs if is_one.any() and not is_one.all()]
    return {"auc": float(np.mean(areas))} if areas else {}


def _area(ranked: np.ndarray, is_one: np.ndarray) -> float:
    """Under the ROC curve: the share of pairs, one of the class and one of the rest, in which the first stands above;
    a tie is half (Hanley and McNeil 1982). NaN if one of them is."""
    if np.isnan(ranked).any():
        return math.nan
    rest, own = np.sort(ranked[~is_one]), ranked[is_one]
    above = np.searchsorted(rest, own, "left") + np.searchsorted(rest, own, "right")
    return float(above.mean() / 2 / len(rest))


def by_label(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """For multi_label_classification: a row a label, at 0.5; images: how many have it."""
    truth, told = labels >= 0.5, logits > 0
    precision, recall, f1, support = metrics.precision_recall_fscore_support(truth, told, average=None, zero_division=0)
    columns = zip(names, support.tolist(), precision.tolist(), recall.tolist(), f1.tolist(), strict=True)
    rows = [dict(zip(("class", "images", "precision", "recall", "f1"), row, strict=True)) for row in columns]
    for k, row in enumerate(rows):
        if row["images"]:
            row["average_precision"] = float(metrics.average_precision_score(truth[:, k], logits[:, k]))
    return {"classes": rows}


def by_class(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """For single_label_classification: a row a class, and the confusion matrix (rows: the true class)."""
    classes = range(len(names))
    predicted = logits.argmax(axis=1)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    columns = zip(names, support.tolist(), precision.tolist(), recall.tolist(), f1.tolist(), strict=True)
    rows = [dict(zip(("class", "images", "precision", "recall", "f1"), row, strict=True)) for row in columns]
    if len(names) > MOST_SHOWN:
        return {"classes": rows}
    return {"classes": rows, "confusion": metrics.confusion_matrix(labels, predicted, labels=classes).tolist()}
