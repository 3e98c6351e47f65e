"""Labels by the nearest neighbours in cosine similarity (Wu et al. 2018, arXiv 1805.01978), the bank on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.engine.ranks import ProcessRanks
from vitscale.evaluation.features import FeatureTable

TEMPERATURE = 0.07  # of the votes, as in the paper
_QUERIES = 1024  # at a time


@torch.inference_mode()
def knn_predict(
    bank: FeatureTable,
    codes: Tensor,
    queries: FeatureTable,
    pooling: str,
    neighbours: int,
    scale: Callable[[Tensor], Tensor],
    ranks: ProcessRanks,
    temperature: float | None = TEMPERATURE,
) -> Tensor:
    """The class that the nearest samples of all ranks' banks vote for: int64 [this rank's queries]. A collective.

    codes: int64, the classes of this rank's bank, on the device; scale: what is done to features first. A neighbour's
    vote weighs exp(similarity / temperature), or each the same. Of classes with equal votes the smallest is taken. At
    most as many neighbours vote as there are.
    """
    device, own = codes.device, torch.empty(0, dtype=torch.int64)
    for rank in range(ranks.world_size):
        mine = rank == ranks.rank
        width = bank.rows(pooling).shape[1]
        asked = ranks.broadcast(queries.rows(pooling).tobytes() if mine else None, source=rank)
        values = torch.from_numpy(np.frombuffer(asked, np.float16).reshape(-1, width).astype(np.float32))
        votes = []
        for part in values.split(_QUERIES) if len(values) else ():
            ranks.check_stop()
            nearest = _nearest(bank, codes, pooling, F.normalize(scale(part.to(device)), dim=1), neighbours, scale)
            of_ranks = ranks.gather(tuple(each.cpu() for each in nearest))
            votes.append(_votes(of_ranks, neighbours, temperature))
        if mine:
            own = torch.cat(votes) if votes else own
    return own.to(device)


def _nearest(
    bank: FeatureTable,
    codes: Tensor,
    pooling: str,
    queries: Tensor,
    neighbours: int,
    scale: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """(similarities, classes), each [queries, at most neighbours], of this rank's bank."""
    best = queries.new_empty(len(queries), 0)
    classes = codes.new_empty(len(queries), 0)
    for rows, features in bank.chunks(pooling, codes.device):
        similarity = torch.cat([best, queries @ F.normalize(scale(features), dim=1).T], dim=1)
        of_chunk = torch.cat([classes, codes[rows].expand(len(queries), -1)], dim=1)
        best, places = similarity.topk(min(neighbours, similarity.shape[1]), dim=1)
        classes = of_chunk.gather(1, places)
    return best, classes


def _votes(of_ranks: list[tuple[Tensor, Tensor]], neighbours: int, temperature: float | None) -> Tensor:
    similarity, classes = (torch.cat([of_rank[part] for of_rank in of_ranks], dim=1) for part in (0, 1))
    nearest, places = similarity.topk(min(neighbours, similarity.shape[1]), dim=1)
    # relative to the nearest, so that exp cannot overflow
    weights = torch.ones_like(nearest) if temperature is None else ((nearest - nearest[:, :1]) / temperature).exp()
    tally = weights.new_zeros(len(nearest), int(classes.max()) + 1)
    return tally.scatter_add_(1, classes.gather(1, places), weights).argmax(dim=1)
