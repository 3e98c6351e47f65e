"""Orders of other kinds than the package has: what reading must carry without knowing of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vitscale.data.order import Order, Refs


def joined(parts: list[Refs]) -> Refs:
    return Refs(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("epochs", "ids", "repeats")))


@dataclass
class Mixture:
    """The first half of every batch from shards up to `border`, the other from those after: epochs of their own."""

    counts: np.ndarray
    border: int
    seed: int
    batch: int

    def __post_init__(self) -> None:
        self.epochs = None
        parts = (self.counts[: self.border], self.counts[self.border :])
        self._sources = [Order(part, self.seed, self.batch // 2, 1, 1000) for part in parts]
        self.batches_per_epoch = self._sources[1].batches_per_epoch
        self.lanes = 2
        self.block = max(source.block for source in self._sources)

    def refs(self, batch: int, first_slot: int, last_slot: int) -> Refs:
        return joined([self._of(slot, "refs", batch, slot % self._half, slot % self._half + 1)
                       for slot in range(first_slot, last_slot)])  # fmt: skip

    def candidates(self, batch: int, slot: int) -> Refs:
        return self._of(slot, "candidates", batch, slot % self._half)

    def shards_ahead(self, batch: int, first_slot: int, last_slot: int, samples: int) -> np.ndarray:
        one, other = (source.shards_ahead(batch, 0, self._half, samples) for source in self._sources)
        return np.concatenate([one, other + self.border])

    @property
    def _half(self) -> int:
        return self.batch // 2

    def _of(self, slot: int, function: str, *arguments: int) -> Refs:
        """What a slot's source says, its shards numbered as the whole index has them."""
        source = slot // self._half
        refs = getattr(self._sources[source], function)(*arguments)
        return replace(refs, ids=refs.ids + (source * self.border << 32))


@dataclass
class Repeated:
    """Repeated augmentation: each run of `run` samples comes `repeats` times, each time as another view."""

    counts: np.ndarray
    seed: int
    batch: int
    run: int
    repeats: int

    def __post_init__(self) -> None:
        self.epochs = None
        self._samples = Order(self.counts, self.seed, self.run, 1, 1000)
        self.batches_per_epoch = self._samples.batches_per_epoch * self.run * self.repeats // self.batch
        self.lanes, self.block = 1, self._samples.block

    def refs(self, batch: int, first_slot: int, last_slot: int) -> Refs:
        views = []
        for slot in range(first_slot, last_slot):
            run, repeat, place = self._view(batch, slot)
            views.append(replace(self._samples.refs(run, place, place + 1), repeats=np.array([repeat])))
        return joined(views)

    def candidates(self, batch: int, slot: int) -> Refs:
        run, repeat, place = self._view(batch, slot)
        others = self._samples.candidates(run, place)
        return replace(others, repeats=np.full(len(others), repeat))

    def shards_ahead(self, batch: int, first_slot: int, last_slot: int, samples: int) -> np.ndarray:
        return self._samples.shards_ahead(self._view(batch, first_slot)[0], 0, self.run, samples)

    def _view(self, batch: int, slot: int) -> tuple[int, int, int]:
        """A slot's run of samples, which time it is that they come, and its place among them."""
        run, inside = divmod(batch * self.batch + slot, self.run * self.repeats)
        return run, *divmod(inside, self.run)
