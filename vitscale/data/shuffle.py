"""How far an order is from a perfect shuffle: what lanes and a window cost in mixing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vitscale.data.order import Order

_LOOKED_AT = 40_000  # samples of batches, at least one batch
_BLOCKS = 4  # of a lane, in which neighbours are looked for
_LONGEST = 4_000_000  # samples of a lane that are looked through


@dataclass(frozen=True)
class Mixing:
    """Of one order, and of a perfect shuffle of the same samples."""

    shards: float  # different ones in a batch, the mean
    perfect_shards: float
    apart: float  # mean distance in the order, in samples, of two that are neighbours in a shard; nan: not looked for
    perfect_apart: float


def mixing(counts: np.ndarray, seed: int, global_batch: int, lanes: int, window: int) -> Mixing:
    """counts: int64 [shards], samples in each; the others as Order takes them."""
    order, total = Order(counts, seed, global_batch, lanes, window), int(counts.sum())
    looked_at = min(order.batches_per_epoch, max(1, _LOOKED_AT // global_batch))
    batches = (np.arange(looked_at) * 2 + 1) * order.batches_per_epoch // (2 * looked_at)
    shards = [len(np.unique(order.refs(batch, 0, global_batch).ids >> 32)) for batch in batches.tolist()]
    apart = _neighbours_apart(counts, seed, lanes, window, order.block)
    return Mixing(float(np.mean(shards)), _perfect_shards(counts, global_batch), apart, (total + 1) / 3)


def _perfect_shards(counts: np.ndarray, batch: int) -> float:
    """How many shards a batch drawn without replacement has samples of: the sum of what is expected of each."""
    total, expected = int(counts.sum()), 0.0
    for samples, shards in zip(*(each.tolist() for each in np.unique(counts, return_counts=True)), strict=True):
        rest = total - samples - batch
        missed = 0.0  # the chance that none of its samples is drawn: C(total - samples, batch) / C(total, batch)
        if rest >= 0:
            missed = math.exp(
                math.lgamma(total - samples + 1) - math.lgamma(rest + 1)
                - math.lgamma(total + 1) + math.lgamma(total - batch + 1)
            )  # fmt: skip
        expected += shards * (1 - missed)
    return expected


def _neighbours_apart(counts: np.ndarray, seed: int, lanes: int, window: int, block: int) -> float:
    """In some lanes' first blocks. What a lane shows does not depend on the batch: one batch of a longer share does."""
    share = min(_BLOCKS * block, int(counts.sum()) // lanes - 1)
    if not 1 < share <= _LONGEST:
        return math.nan
    order, distances = Order(counts, seed, share * lanes, lanes, window), []
    for lane in sorted({0, lanes // 2, lanes - 1}):
        ids = order.refs(0, lane * share, (lane + 1) * share).ids
        places = np.argsort(ids)
        neighbours = np.diff(ids[places]) == 1
        distances.append(np.abs(np.diff(places))[neighbours] * lanes)
    found = np.concatenate(distances)
    return float(found.mean()) if len(found) else math.nan
