"""Labels by the nearest neighbours in cosine similarity (Wu et al. 2018, arXiv 1805.01978)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


@torch.inference_mode()
def knn_predict(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    neighbours: int,
    temperature: float | None = None,
    batch: int = 1024,
    device: str = "cpu",
) -> np.ndarray:
    """The label that most of the `neighbours` nearest training samples have: int64 [tests].

    train_x: float32 [n, width]; train_y: int64 [n]; test_x: float32 [tests, width]. With a
    `temperature` (0.07 in the paper) a neighbour's vote weighs exp(similarity / temperature), else
    each weighs the same. Of labels with equal votes the smallest is taken. At most n neighbours vote.
    """
    classes, codes = np.unique(train_y, return_inverse=True)
    of_class = torch.from_numpy(codes).to(device)
    bank = F.normalize(torch.from_numpy(train_x).to(device), dim=1)
    count = min(neighbours, len(train_x))
    winners = []
    for part in torch.from_numpy(test_x).split(batch):
        similarity = F.normalize(part.to(device), dim=1) @ bank.T
        nearest, places = similarity.topk(count, dim=1)
        # relative to the nearest, so that exp cannot overflow
        votes = torch.ones_like(nearest) if temperature is None else ((nearest - nearest[:, :1]) / temperature).exp()
        tally = votes.new_zeros(len(part), len(classes)).scatter_add_(1, of_class[places], votes)
        winners.append(tally.argmax(dim=1).cpu().numpy())
    return classes[np.concatenate(winners)]
