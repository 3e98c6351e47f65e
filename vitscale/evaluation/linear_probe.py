"""Linear classifiers on frozen features that lie on all ranks: ridge in closed form, or logistic regression.

Features are standardized by the images that are fitted on. Each rank goes through its own rows; what is summed over the
ranks is as large as the classifier, or width x width, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.engine.ranks import ProcessRanks
from vitscale.evaluation.features import FeatureTable

STRENGTHS = {  # of the L2 penalty, from strong to weak: ridge's in deviations, logistic's beside the mean cross-entropy
    "ridge": (1.0, 1e-1, 1e-2, 1e-3, 1e-4),
    "logistic": (1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
}
_MOST_STEPS = 200  # of L-BFGS


@dataclass
class Moments:
    """Sums over labelled features in float64, from which everything linear follows; they add and subtract."""

    counts: Tensor  # [classes] images
    sums: Tensor  # [classes, width] of features
    products: Tensor  # [width, width] sum of the outer products

    @staticmethod
    def zero(classes: int, width: int, device: torch.device) -> Moments:
        return Moments(*(torch.zeros(*shape, dtype=torch.float64, device=device)
                         for shape in ((classes,), (classes, width), (width, width))))  # fmt: skip

    def add(self, features: Tensor, labels: Tensor) -> None:
        """features [n, width]; labels int64 [n]."""
        features = features.double()
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self.sums.index_add_(0, labels, features)
        self.products.addmm_(features.T, features)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.counts - other.counts, self.sums - other.sums, self.products - other.products)

    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation by dimension, float64 [width]; a constant dimension's deviation is 1."""
        total = self.counts.sum()
        mean = self.sums.sum(dim=0) / total
        variance = self.products.diagonal() / total - mean.square()
        constant = variance < 1e-12 * mean.square().max().clamp(min=1.0)
        return mean, torch.where(constant, 1.0, variance.clamp(min=0).sqrt())


@dataclass
class Classifier:
    """Linear functions of standardized features: the largest says the class."""

    mean: Tensor  # [width]
    deviation: Tensor  # [width]
    weights: Tensor  # [width, classes]
    bias: Tensor  # [classes]

    def predict(self, features: Tensor) -> Tensor:
        """int64 [n] of float32 [n, width]"""
        scaled = (features - self.mean.float()) / self.deviation.float()
        return (scaled @ self.weights.float() + self.bias.float()).argmax(dim=1)


def ridge(moments: Moments, strengths: Sequence[float]) -> list[Classifier]:
    """One for each strength: least squares on 1 for the class and -1 for the others, the penalty strength x images."""
    total = moments.counts.sum()
    mean, deviation = moments.scale()
    products = (moments.products - total * torch.outer(mean, mean)) / torch.outer(deviation, deviation)
    targets = 2 * (moments.sums - moments.counts[:, None] * mean).T / deviation[:, None]
    bias = 2 * moments.counts / total - 1
    unit = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
    factors = (torch.linalg.cholesky(products + strength * total * unit) for strength in strengths)
    solved = [torch.cholesky_solve(targets, factor) for factor in factors]
    return [Classifier(mean, deviation, weights, bias) for weights in solved]


def logistic(
    table: FeatureTable,
    pooling: str,
    codes: Tensor,
    fitted: np.ndarray,
    moments: Moments,
    strengths: Sequence[float],
    ranks: ProcessRanks,
) -> list[Classifier]:
    """Multinomial logistic regression by at most 200 steps of L-BFGS for each strength, from the one before it.

    codes: int64, the rows' classes, on the device; fitted: bool, the rows that count; moments: of those rows on all
    ranks. A collective: every rank makes the same steps, from the same sums.
    """
    device, (classes, width) = codes.device, moments.sums.shape
    mean, deviation = moments.scale()
    total, mask = float(moments.counts.sum()), torch.from_numpy(fitted).to(device)
    # float64: the same to an image on any number of ranks
    weights, bias = (
        torch.zeros(*shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((width, classes), (classes,))
    )

    def loss_and_gradient(strength: float) -> Tensor:
        ranks.check_stop()
        summed = torch.zeros((), dtype=torch.float64, device=device)
        weights.grad, bias.grad = torch.zeros_like(weights), torch.zeros_like(bias)
        for rows, features in table.chunks(pooling, device):
            chosen = mask[rows]
            logits = (features[chosen].double() - mean) / deviation @ weights + bias
            loss = F.cross_entropy(logits, codes[rows][chosen], reduction="sum") / total
            loss.backward()
            summed += loss.detach()
        for value in (summed, weights.grad, bias.grad):
            ranks.sum_in_place(value)
        penalty = strength / 2 * weights.detach().square().sum()
        weights.grad += strength * weights.detach()
        return summed + penalty

    found = []
    for strength in strengths:
        steps = torch.optim.LBFGS(
            [weights, bias], max_iter=_MOST_STEPS, history_size=10, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
        )
        with torch.enable_grad():
            steps.step(lambda strength=strength: loss_and_gradient(strength))
        found.append(Classifier(mean, deviation, weights.detach().clone(), bias.detach().clone()))
    return found
