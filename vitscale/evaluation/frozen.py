"""What frozen features are worth: a linear probe, neighbours, few labels, and signs of collapse.

The same scores for any features, while a run trains and after it, on one device or on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscale import rng
from vitscale.config.schema import Evaluation
from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import DataError
from vitscale.evaluation.features import FeatureTable
from vitscale.evaluation.knn import knn_predict
from vitscale.evaluation.linear_probe import STRENGTHS, Classifier, Moments, logistic, ridge

_MOST_SPECTRUM = 4096  # images whose singular values are looked at
_DEAD = 1e-3  # of the typical deviation of a dimension
_FEW_STRENGTH = 1.0  # of the penalty where there are few labels to choose it by


@torch.no_grad()
def frozen_scores(
    train: FeatureTable,
    test: FeatureTable | None,
    poolings: Sequence[str],
    evaluation: Evaluation,
    ranks: ProcessRanks,
    device: torch.device,
    shots: Sequence[int] = (),
) -> dict[str, float]:
    """The scores of some poolings of one encoder; the same on every rank. A collective.

    Pooling and strength of the probe are those that do best in cross-validation on the training images.
    linear_probe_folds: their mean accuracy there, its deviation over the folds, `_sd`, and standard error, `_se`. With
    test images: images, how many; linear_probe, knn (of the first pooling), each with one standard error, `_se`;
    few_shot_N for each N of `shots` that every class has: the accuracy with N labels of each class, of the first
    pooling, a mean over evaluation.seeds draws, and its deviation, `_sd`; and `spread_of` the first pooling's features.
    DataError where the labels do not serve.
    """
    fit = _Fit(train, evaluation, ranks, device)
    best = max((fit.cross_validate(pooling) for pooling in poolings), key=lambda each: each.mean)
    spread = _deviation(best.accuracies)
    scores = {"linear_probe_folds": best.mean, "linear_probe_folds_sd": spread}
    scores["linear_probe_folds_se"] = spread / math.sqrt(max(1, len(best.accuracies)))
    if test is None:
        return scores
    test_codes, moments = fit.codes_of(test.labels), fit.moments(poolings[0])
    mean, deviation = (each.float() for each in moments.scale())
    probed = _predicted(test, best.pooling, fit.classifier(best), device)
    voted = knn_predict(
        train, fit.codes, test, poolings[0], evaluation.neighbours, lambda x: (x - mean) / deviation, ranks
    )
    right = {name: (each == test_codes).sum() for name, each in (("linear_probe", probed), ("knn", voted))}
    counts = ranks.sum({"images": float(len(test)), **{name: float(count) for name, count in right.items()}})
    images = counts.pop("images")
    if not images:
        raise DataError("evaluation.test: no labelled image could be read; look at data.label and data.decode")
    if not ranks.sum({"known": float((test_codes >= 0).sum())})["known"]:
        raise DataError("evaluation.test: none of its labels is one of evaluation.train; are they numbered alike?")
    scores["images"] = images
    for name in right:
        scores[name] = counts[name] / images
        scores[f"{name}_se"] = math.sqrt(scores[name] * (1 - scores[name]) / images)
    for shot in (shot for shot in shots if shot <= fit.smallest_class):
        few = [fit.few_shot(poolings[0], shot, seed, test, test_codes) for seed in range(evaluation.seeds)]
        scores |= {f"few_shot_{shot}": float(np.mean(few)), f"few_shot_{shot}_sd": _deviation(few)}
    return scores | spread_of(_first_rows(test, poolings[0], ranks))


@dataclass(frozen=True)
class _Choice:
    pooling: str
    strength: int  # its place among STRENGTHS
    accuracies: list[float]  # by fold

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))


class _Fit:
    """The training images of all ranks: classifiers fitted on all of them, on all but a fold, or on a few."""

    def __init__(self, table: FeatureTable, evaluation: Evaluation, ranks: ProcessRanks, device: torch.device) -> None:
        self._table, self._ranks, self._device = table, ranks, device
        self._probe, self._folds = evaluation.probe, evaluation.folds
        gathered = ranks.gather((table.ids, table.labels))
        self._ids, self._labels = (np.concatenate([of_rank[part] for of_rank in gathered]) for part in (0, 1))
        self.classes = np.unique(self._labels)
        if len(self.classes) < 2:
            which = f"{len(self._labels)} labelled images of {len(self.classes)} class(es)"
            raise DataError(f"evaluation.train: {which} could be read, and a classifier needs two; look at data.label")
        self.codes = self.codes_of(table.labels)
        self.smallest_class = int(np.unique(self._labels, return_counts=True)[1].min())
        self._fold = (rng.uniform(table.ids, "fold", 1)[:, 0] * self._folds).astype(np.int64)
        self._of_folds: dict[str, list[Moments]] = {}

    def codes_of(self, labels: np.ndarray) -> Tensor:
        """Places among the training images' classes, -1 for another: int64, on the device."""
        places = np.searchsorted(self.classes, labels).clip(max=len(self.classes) - 1)
        return torch.from_numpy(np.where(self.classes[places] == labels, places, -1)).to(self._device)

    def moments(self, pooling: str) -> Moments:
        """Of all training images."""
        of_folds = self._moments_of_folds(pooling)
        parts = zip(*((each.counts, each.sums, each.products) for each in of_folds), strict=True)
        return Moments(*(torch.stack(part).sum(dim=0) for part in parts))

    def _moments_of_folds(self, pooling: str) -> list[Moments]:
        if pooling not in self._of_folds:
            width = self._table.rows(pooling).shape[1]
            of_folds = [Moments.zero(len(self.classes), width, self._device) for _ in range(self._folds)]
            fold = torch.from_numpy(self._fold).to(self._device)
            for rows, features in self._table.chunks(pooling, self._device):
                for number, moments in enumerate(of_folds):
                    chosen = fold[rows] == number
                    moments.add(features[chosen], self.codes[rows][chosen])
            for moments in of_folds:
                for value in (moments.counts, moments.sums, moments.products):
                    self._ranks.sum_in_place(value)
            self._of_folds[pooling] = of_folds
        return self._of_folds[pooling]

    def cross_validate(self, pooling: str) -> _Choice:
        """The strength that does best, and how well in each fold. Of logistic regression the first fold chooses it."""
        of_folds, whole = self._moments_of_folds(pooling), self.moments(pooling)
        strengths = range(len(STRENGTHS[self._probe]))
        right = np.array([
            self._right_in_fold(pooling, number, self._classifiers(pooling, whole - fold, number, strengths))
            for number, fold in enumerate(of_folds[: None if self._probe == "ridge" else 1])
        ])  # fmt: skip
        images = np.array([float(fold.counts.sum()) for fold in of_folds])
        best = int(right.sum(axis=0).argmax())
        of_best = list(right[:, best])
        for number in range(len(of_best), self._folds):
            classifiers = self._classifiers(pooling, whole - of_folds[number], number, [best])
            of_best += self._right_in_fold(pooling, number, classifiers)
        return _Choice(pooling, best, [float(n / total) for n, total in zip(of_best, images, strict=True) if total])

    def classifier(self, choice: _Choice) -> Classifier:
        """Fitted on all training images."""
        return self._classifiers(choice.pooling, self.moments(choice.pooling), None, [choice.strength])[0]

    def _classifiers(
        self, pooling: str, moments: Moments, without: int | None, strengths: Sequence[int]
    ) -> list[Classifier]:
        chosen = [STRENGTHS[self._probe][number] for number in strengths]
        if self._probe == "ridge":
            return ridge(moments, chosen)
        fitted = np.ones(len(self._table), bool) if without is None else self._fold != without
        return logistic(self._table, pooling, self.codes, fitted, moments, chosen, self._ranks)

    def _right_in_fold(self, pooling: str, number: int, classifiers: Sequence[Classifier]) -> list[float]:
        """How many of a fold's images each classifier tells right."""
        fold = torch.from_numpy(self._fold == number).to(self._device)
        right = torch.zeros(len(classifiers))
        for rows, features in self._table.chunks(pooling, self._device):
            asked, codes = features[fold[rows]], self.codes[rows][fold[rows]]
            right += torch.stack([(each.predict(asked) == codes).sum().cpu() for each in classifiers])
        summed = self._ranks.sum({str(place): float(count) for place, count in enumerate(right)})
        return [summed[str(place)] for place in range(len(classifiers))]

    def few_shot(self, pooling: str, shot: int, seed: int, test: FeatureTable, test_codes: Tensor) -> float:
        """Accuracy of a ridge classifier on `shot` images of each class, those of the smallest hash of their ids.

        Standardized by all training images, which needs no labels.
        """
        self._ranks.check_stop()
        order = np.lexsort((rng.fold(self._ids, seed + 1), self._labels))
        starts = np.searchsorted(self._labels[order], self.classes)
        ends = np.append(starts[1:], len(order))
        chosen = self._ids[np.concatenate([order[a : min(a + shot, b)] for a, b in zip(starts, ends, strict=True)])]
        own = np.flatnonzero(np.isin(self._table.ids, chosen))
        gathered = self._ranks.gather((self._table.rows(pooling, own), self.codes[own].cpu()))
        mean, deviation = self.moments(pooling).scale()
        features = torch.from_numpy(np.concatenate([each[0] for each in gathered])).double().to(self._device)
        moments = Moments.zero(len(self.classes), features.shape[1], self._device)
        moments.add((features - mean) / deviation, torch.cat([each[1] for each in gathered]).to(self._device))
        (few,) = ridge(moments, [_FEW_STRENGTH])
        joined = Classifier(mean + few.mean * deviation, deviation * few.deviation, few.weights, few.bias)
        right = (_predicted(test, pooling, joined, self._device) == test_codes).sum()
        counts = self._ranks.sum({"right": float(right), "images": float(len(test))})
        return counts["right"] / counts["images"]


def _predicted(table: FeatureTable, pooling: str, classifier: Classifier, device: torch.device) -> Tensor:
    parts = [classifier.predict(features) for _, features in table.chunks(pooling, device)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _first_rows(table: FeatureTable, pooling: str, ranks: ProcessRanks) -> np.ndarray:
    """Features of the images with the smallest ids, in the order of their ids, the same whatever the ranks."""
    ids = np.sort(np.concatenate(ranks.gather(table.ids)))
    last = ids[min(_MOST_SPECTRUM, len(ids)) - 1]
    own = np.flatnonzero(table.ids <= last)
    gathered: list[Any] = ranks.gather((table.ids[own], table.rows(pooling, own)))
    order = np.argsort(np.concatenate([each[0] for each in gathered]))
    return np.concatenate([each[1] for each in gathered])[order]


def spread_of(features: np.ndarray) -> dict[str, float]:
    """How much features [n, width] differ from each other.

    rankme: the exponential of the entropy of the singular values (Garrido et al. 2023, arXiv 2210.02885), up to width;
    feature_deviation: of a dimension of features of length 1, times sqrt(width): about 1 where they spread evenly, 0
    where they are one point; mean_cosine: between two of them; dead_dimensions: the share that hardly varies.
    """
    x = torch.from_numpy(np.ascontiguousarray(features)).double()
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
