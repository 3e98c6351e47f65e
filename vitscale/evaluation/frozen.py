"""What frozen features are worth while a run trains: a linear probe, neighbours, and signs of collapse.

The same few figures for any features, computed on one device from features that all ranks made.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vitscale.evaluation.features import standardize
from vitscale.evaluation.knn import knn_predict

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, times the number of samples
_MOST_SPECTRUM = 4096  # samples whose singular values are looked at
_DEAD = 1e-3  # of the typical deviation of a dimension
TEMPERATURE = 0.07  # of neighbours' votes


def frozen_scores(
    train: dict[str, np.ndarray], train_y: np.ndarray, test: dict[str, np.ndarray], test_y: np.ndarray, neighbours: int
) -> dict[str, float]:
    """linear_probe and knn: the share of `test` that is told right; and `spread_of` the first pooling's test features.

    train, test: by pooling, float [n, width]; the probe takes the pooling and the strength that do best on a fifth of
    the training samples, kNN (cosine, weighted) the first pooling.
    """
    pooling = next(iter(test))
    bank, asked = standardize(train[pooling].astype(np.float32), test[pooling].astype(np.float32))
    predicted = knn_predict(bank, train_y, asked, neighbours, TEMPERATURE)
    return {
        "linear_probe": _ridge(train, train_y, test, test_y),
        "knn": float((predicted == test_y).mean()),
        **spread_of(test[pooling]),
    }


def spread_of(features: np.ndarray) -> dict[str, float]:
    """How much features [n, width] differ from each other.

    rankme: the exponential of the entropy of the singular values (Garrido et al. 2023, arXiv 2210.02885), up to width;
    feature_deviation: of a dimension of features of length 1, times sqrt(width): about 1 where they spread evenly, 0
    where they are one point; mean_cosine: between two of them; dead_dimensions: the share that hardly varies.
    """
    x = torch.from_numpy(np.ascontiguousarray(features[:_MOST_SPECTRUM])).double()
    values = torch.linalg.svdvals(x)
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    unit = torch.nn.functional.normalize(x, dim=1)
    n, deviation = len(x), x.std(dim=0)
    total = float(unit.sum(dim=0).square().sum())
    return {
        "rankme": float(torch.exp(-(shares * shares.log()).sum())),
        "feature_deviation": float(unit.std(dim=0).mean()) * math.sqrt(x.shape[1]),
        "mean_cosine": (total - n) / max(1, n * (n - 1)),
        "dead_dimensions": float((deviation < _DEAD * deviation.median().clamp(min=1e-12)).double().mean()),
    }


def _ridge(train: dict[str, np.ndarray], train_y: np.ndarray, test: dict[str, np.ndarray], test_y: np.ndarray) -> float:
    """Accuracy of a ridge classifier in closed form: one decomposition for all strengths of a pooling."""
    classes = np.unique(train_y)
    targets = 2.0 * (train_y[:, None] == classes) - 1.0
    held_out = np.arange(len(train_y)) % 5 == 4
    best, answer = -1.0, 0.0
    for pooling, features in train.items():
        fitted, scored = standardize(features.astype(np.float32), test[pooling].astype(np.float32))
        own, targets_own = torch.from_numpy(fitted[~held_out]).double(), torch.from_numpy(targets[~held_out])
        mean = targets_own.mean(dim=0)
        values, vectors = torch.linalg.eigh(own.T @ own)
        projected = vectors.T @ (own.T @ (targets_own - mean))
        for strength in STRENGTHS:
            weights = vectors @ (projected / (values.clamp(min=0) + strength * len(own))[:, None])
            chosen = _accuracy(fitted[held_out], weights, mean, classes, train_y[held_out])
            if chosen > best:
                best, answer = chosen, _accuracy(scored, weights, mean, classes, test_y)
    return answer


def _accuracy(features: np.ndarray, weights: Tensor, mean: Tensor, classes: np.ndarray, labels: np.ndarray) -> float:
    answers = (torch.from_numpy(features).double() @ weights + mean).argmax(dim=1).numpy()
    return float((classes[answers] == labels).mean())
