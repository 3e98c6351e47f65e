"""Orders that are made of another one, and one of them: without some of its batches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitscale.data.order import Refs, SampleOrder


@dataclass(frozen=True, eq=False)
class DerivedOrder:
    """A SampleOrder that is another one but for what it overrides."""

    order: SampleOrder

    @property
    def epochs(self) -> int | None:
        return self.order.epochs

    @property
    def batches_per_epoch(self) -> int:
        return self.order.batches_per_epoch

    def epoch(self, batch: int) -> int:
        return self.order.epoch(self.batch(batch))

    @property
    def lanes(self) -> int:
        return self.order.lanes

    @property
    def sources(self) -> int:
        return self.order.sources

    @property
    def block(self) -> int:
        return self.order.block

    def batch(self, number: int) -> int:
        """Which batch of the other order is taken for one of this."""
        return number

    def refs(self, batch: int, first_slot: int, last_slot: int) -> Refs:
        return self.order.refs(self.batch(batch), first_slot, last_slot)

    def candidates(self, batch: int, slot: int) -> Refs:
        return self.order.candidates(self.batch(batch), slot)

    def shards_ahead(self, batch: int, first_slot: int, last_slot: int, samples: int) -> np.ndarray:
        return self.order.shards_ahead(self.batch(batch), first_slot, last_slot, samples)


def nth_left(number: int, skipped: Sequence[int]) -> int:
    """The number-th (from 0) of the whole numbers 0, 1, ... without those skipped, which ascend."""
    return number + bisect_right([batch - before for before, batch in enumerate(skipped)], number)


@dataclass(frozen=True, eq=False)
class SkippingOrder(DerivedOrder):
    """Another order without some of its batches: a position is still one integer, of what is left."""

    skipped: tuple[int, ...]  # numbers of the other order's batches, ascending

    def batch(self, number: int) -> int:
        return nth_left(number, self.skipped)
