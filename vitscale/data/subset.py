"""Some of the samples of an index: a split for validation, and an order over it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vitscale import rng
from vitscale.config.schema import Data
from vitscale.data.derived_order import DerivedOrder
from vitscale.data.index import ShardIndex
from vitscale.data.order import Refs
from vitscale.errors import DataError

_PLACE = (1 << 32) - 1


@dataclass(frozen=True, eq=False)
class Subset:
    """For each shard the places of its samples that belong to it."""

    starts: np.ndarray  # int64 [shards + 1]: where each shard's begin in `places`
    places: np.ndarray  # int32 [samples], ascending within a shard

    @property
    def counts(self) -> np.ndarray:
        """int64 [shards]"""
        return np.diff(self.starts)

    @property
    def total(self) -> int:
        return len(self.places)

    def of_shard(self, shard: int) -> np.ndarray:
        return self.places[self.starts[shard] : self.starts[shard + 1]]

    def ids(self, ids: np.ndarray) -> np.ndarray:
        """shard << 32 | number among the shard's chosen ones -> the sample's id; int64 [n]."""
        shards = ids >> 32
        return (shards << 32) | self.places[self.starts[shards] + (ids & _PLACE)]


def split(index: ShardIndex, data: Data, seed: int) -> tuple[Subset, Subset]:
    """(training, validation) by data.validation_fraction and data.fraction; reads the tables of all shards.

    On which side a sample is follows from a hash of its key and of nothing else, so that the split stays whatever the
    order, the shards, the seed or other samples are; samples of the same key are on one side. What of the training side
    is used follows from the seed too. DataError where one side is empty.
    """
    label = data.label_extension
    index.complete_tables(label)
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for shard in range(len(index.paths)):
        keys = index.table(shard, label).key_hash.astype(np.int64)
        held_out = rng.uniform(keys, "validation", 1)[:, 0] < data.validation_fraction
        used = rng.uniform(rng.fold(keys, seed), "fraction", 1)[:, 0] < data.fraction
        for side, chosen in zip(sides, (~held_out & used, held_out), strict=True):
            side.append(np.flatnonzero(chosen).astype(np.int32))
    training, validation = (
        Subset(np.concatenate([[0], np.cumsum([len(of_shard) for of_shard in side])]), np.concatenate(side))
        for side in sides
    )
    if not training.total or (data.validation_fraction and not validation.total):
        raise DataError(
            f"data.validation_fraction={data.validation_fraction}, data.fraction={data.fraction}: leave "
            f"{training.total} samples to train on and {validation.total} to validate on; change them, or name shards "
            "of their own as data.validation"
        )
    return training, validation


def chosen_by_hash(index: ShardIndex, label: str, share: float, within: Subset | None = None) -> Subset:
    """About this share of all samples, or of those of a subset, by a hash of their keys."""
    index.complete_tables(label)
    places = []
    for shard in range(len(index.paths)):
        keys = index.table(shard, label).key_hash.astype(np.int64)
        own = np.arange(len(keys), dtype=np.int32) if within is None else within.of_shard(shard)
        places.append(own[rng.uniform(keys[own], "evaluation", 1)[:, 0] < share])
    return Subset(np.concatenate([[0], np.cumsum([len(each) for each in places])]), np.concatenate(places))


@dataclass(frozen=True, eq=False)
class SubsetOrder(DerivedOrder):
    """A SampleOrder over a subset's counts, as one of the index's samples."""

    subset: Subset

    def refs(self, batch: int, first_slot: int, last_slot: int) -> Refs:
        return self._resolved(super().refs(batch, first_slot, last_slot))

    def candidates(self, batch: int, slot: int) -> Refs:
        return self._resolved(super().candidates(batch, slot))

    def _resolved(self, refs: Refs) -> Refs:
        return replace(refs, ids=self.subset.ids(refs.ids))
