"""Which samples make up global batch t: pure functions of (seed, epoch, batch, slot).

Nothing is stored and any position costs the same, so a run's place in the data is one integer:
samples consumed. Sample ids are shard << 32 | place in the shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from vitscale import rng
from vitscale.errors import DataError

SUBSTITUTES = 64  # samples tried in the place of a bad one before the data are called unreadable
_LARGEST = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Refs:
    """Which view of which sample stands in each of some slots: all that its key is hashed from, but for the seed.

    int64 [n] each. Epochs may differ between slots: each source of a mixture counts its own.
    """

    epochs: np.ndarray
    ids: np.ndarray  # shard << 32 | place in the shard
    repeats: np.ndarray  # which of the views that repeated augmentation shows of a sample in one epoch

    @classmethod
    def of_epoch(cls, epoch: int, ids: np.ndarray) -> Refs:
        """Samples of one epoch, each seen once in it."""
        return cls(np.full_like(ids, epoch), ids, np.zeros_like(ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: slice | list[int]) -> Refs:
        return Refs(self.epochs[at], self.ids[at], self.repeats[at])

    def keys(self, seed: int) -> np.ndarray:
        """The samples' keys: int64 [n]."""
        return rng.sample_key(seed, self.epochs, self.ids, self.repeats)


class SampleOrder(Protocol):
    """What reading asks of an order: pure functions of a global batch's number and a slot in it."""

    @property
    def epochs(self) -> int | None:
        """How many it has; None: endless."""

    @property
    def batches_per_epoch(self) -> int: ...

    def epoch(self, batch: int) -> int:
        """Which epoch a batch is said to be of."""

    @property
    def lanes(self) -> int:
        """Parallel runs through the shards."""

    @property
    def sources(self) -> int:
        """From how many places in the shards a lane reads in turn."""

    @property
    def block(self) -> int:
        """Samples of a lane that are near each other in its shards and come in any order."""

    def refs(self, batch: int, first_slot: int, last_slot: int) -> Refs:
        """What stands in slots first_slot to last_slot - 1."""

    def candidates(self, batch: int, slot: int) -> Refs:
        """What to try in place of a bad sample, in this order.

        Whole references, so that a replacement's key too is hashed from its own epoch, id and repeat alone.
        """

    def shards_ahead(self, batch: int, first_slot: int, last_slot: int, samples: int) -> np.ndarray:
        """int64 shard numbers, each once, soonest first: those that the lanes of these slots read for this batch
        and for the next `samples` samples of each lane, and a few more where a block is read in any order."""


class Passes:
    """Endless shuffled passes over some shards, in L parallel lanes; what an order puts into its slots.

    A pass permutes the shards; their concatenation, rotated by a hash, is cut into L equal lanes of samples. A lane's
    blocks are each permuted by hash. Of a pass's N samples each lies in one place of one lane, but for N mod L of them,
    others every time.
    """

    def __init__(self, counts: np.ndarray, seed: int, lanes: int, window: int) -> None:
        """counts: int64 [shards], samples in each, lanes or more together; window: samples over all lanes that are
        shuffled among each other."""
        self._counts = np.asarray(counts, dtype=np.int64)
        self._total = int(self._counts.sum())
        self._seed = seed
        self.lanes, self.shard_count = lanes, len(self._counts)
        self.lane_length = self._total // lanes
        self.block = min(max(1, window // lanes), self.lane_length)
        # The last block takes the remainder, so that no block is too small to replace a bad sample in.
        self._blocks = self.lane_length // self.block
        self._shuffles: dict[int, _Shuffle] = {}

    def ids(self, number: int, lanes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Sample ids at places of lanes, in the hashed order of pass `number`; int64 [n]."""
        return self._ids(number, lanes, self._permuted(number, lanes, places))

    def others(self, number: int, lane: int, place: int) -> np.ndarray:
        """What to try in place of the sample at a place: the others of its block in hashed order, from the next one on.

        Where the block holds too few, those of the blocks after it follow.
        """
        start, length = (int(bound[0]) for bound in self.block_of(np.array([place], dtype=np.int64)))
        others = start + (place - start + np.arange(1, length)) % length
        after = (start + length + np.arange(min(SUBSTITUTES, self.lane_length - length))) % self.lane_length
        places = np.concatenate([others, after])[:SUBSTITUTES]
        return self.ids(number, np.full(len(places), lane), places)

    def shards(self, number: int, lanes: np.ndarray, first: np.ndarray, last: np.ndarray) -> list[int]:
        """The shards of the blocks in which lanes have places first to last - 1 (int64, one a lane), each as often as
        lanes have it, in the order that they are come to."""
        shuffle = self._shuffle(number)
        first = self.block_of(first)[0]
        start, length = self.block_of(last - 1)
        last = start + length
        begin = lanes * self.lane_length + first + shuffle.rotation
        ranks, lane = _ranks_between(shuffle.ends, begin, begin + last - first)
        rounds, ranks = np.divmod(ranks, len(shuffle.ends))
        shards = shuffle.shards[ranks]
        # How far into its lane's places each shard starts; the one that a lane stands in starts before them.
        begins = rounds * self._total + shuffle.ends[ranks] - self._counts[shards] - begin[lane]
        return shards[np.argsort(begins, kind="stable")].tolist()

    def block_of(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First place and length of the block that each place lies in."""
        block = np.minimum(places // self.block, self._blocks - 1)
        start = block * self.block
        return start, np.where(block == self._blocks - 1, self.lane_length - start, self.block)

    def _permuted(self, number: int, lanes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Where in its lane the sample lies that comes at each place of the hashed order."""
        if len(places) == 0:
            return places
        starts, lengths = self.block_of(places)
        blocks, which = np.unique(np.stack([lanes, starts, lengths]), axis=1, return_inverse=True)
        lane, start, length = blocks
        keys = rng.fold(rng.fold(lane, rng.key("window", self._seed, number)), start)
        width = int(length.max())
        hashes = rng.bits(keys, width)
        hashes[np.arange(width) >= length[:, None]] = _LARGEST  # beyond a shorter block's end
        permutations = np.argsort(hashes, axis=1, kind="stable")
        return starts + permutations[which, places - starts]

    def _ids(self, number: int, lanes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Sample ids at unhashed places of lanes."""
        shuffle = self._shuffle(number)
        position = (lanes * self.lane_length + places + shuffle.rotation) % self._total
        rank = np.searchsorted(shuffle.ends, position, side="right")
        shard = shuffle.shards[rank]
        return (shard << 32) | (position - (shuffle.ends[rank] - self._counts[shard]))

    def _shuffle(self, number: int) -> _Shuffle:
        known = self._shuffles.get(number)
        if known is None:
            shards = rng.permutation(len(self._counts), rng.key("shards", self._seed, number))
            rotation = rng.key("rotation", self._seed, number) % self._total
            known = _Shuffle(shards, np.cumsum(self._counts[shards]), rotation)
            # Batches read ahead, and shards fetched ahead, cross a pass's border: its neighbours stay known.
            self._shuffles = {n: s for n, s in self._shuffles.items() if abs(n - number) == 1} | {number: known}
        return known


class Views:
    """The views of a lane with R repeats (Hoffer et al. 2019, arXiv 1901.09335): each run of K samples is shown R times
    before the next run, K the largest even number with K x R at most the lane's share of a batch."""

    def __init__(self, share: int, repeats: int) -> None:
        self.repeats = repeats
        self.run = 1 if repeats == 1 else share // (2 * repeats) * 2
        assert self.run > 0, "config/check.py refuses so many lanes"

    def shown(self, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places of a lane whose samples are shown at its views, and which showing of them it is; int64 [n]."""
        run, view = np.divmod(views, self.run * self.repeats)
        repeat, place = np.divmod(view, self.run)
        return run * self.run + place, repeat

    def places(self, first: int, last: int) -> tuple[int, int]:
        """The runs that views first to last - 1 are of: their first place, and the one after their last."""
        runs = (at // (self.run * self.repeats) for at in (first, last - 1))
        return next(runs) * self.run, (next(runs) + 1) * self.run


class Order:
    """Shuffled epochs in L parallel lanes: `Passes`, of which each epoch is one, cut into whole batches.

    Global batch t takes B / L samples of each lane in turn: slot s lies in lane s // (B / L). Of an epoch's N samples
    each comes once but for a dropped tail smaller than B + L, another one every epoch. With repeats every slot is a
    view, see `Views`, and an epoch is as many times longer.
    """

    epochs: int | None = None  # endless
    sources = 1

    def __init__(
        self,
        counts: np.ndarray,
        seed: int,
        global_batch: int,
        lanes: int,
        window: int,
        repeats: int = 1,
        epoch_samples: int | None = None,
    ) -> None:
        """counts: int64 [shards], samples in each; window: samples over all lanes; epoch_samples: what else is called
        an epoch. lanes divides global_batch, and leaves 2 x repeats slots or more of a lane in a batch where repeats is
        above 1."""
        assert global_batch % lanes == 0, "config/check.py refuses lanes that do not divide the batch"
        total = int(np.sum(counts))
        if total < global_batch + lanes:
            raise DataError(
                f"train.global_batch={global_batch}: the data hold {total} samples, an epoch needs at least "
                f"train.global_batch + data.lanes = {global_batch + lanes}; lower train.global_batch or add shards"
            )
        self.lanes = lanes
        self._share = global_batch // lanes  # samples of one lane in a batch
        self._passes = Passes(counts, seed, lanes, window)
        self._views = Views(self._share, repeats)
        self.block = self._passes.block
        self._batches = self._passes.lane_length // self._views.run * self._views.run * repeats // self._share
        self.batches_per_epoch = max(1, epoch_samples // global_batch) if epoch_samples else self._batches

    def epoch(self, batch: int) -> int:
        """Which epoch a batch is of."""
        return batch // self.batches_per_epoch

    def refs(self, batch: int, first_slot: int, last_slot: int) -> Refs:
        """What stands in slots first_slot to last_slot - 1 of a batch counted over all epochs."""
        number, turn = divmod(batch, self._batches)
        slots = np.arange(first_slot, last_slot, dtype=np.int64)
        places, repeats = self._views.shown(turn * self._share + slots % self._share)
        ids = self._passes.ids(number, slots // self._share, places)
        return Refs(np.full_like(ids, number), ids, repeats)

    def candidates(self, batch: int, slot: int) -> Refs:
        """What to try in place of a bad sample, see `Passes.others`. All are of the slot's pass."""
        number, turn = divmod(batch, self._batches)
        lane, place = divmod(slot, self._share)
        place, repeat = (int(of[0]) for of in self._views.shown(np.array([turn * self._share + place])))
        ids = self._passes.others(number, lane, place)
        return Refs(np.full_like(ids, number), ids, np.full_like(ids, repeat))

    def shards_ahead(self, batch: int, first_slot: int, last_slot: int, samples: int) -> np.ndarray:
        """int64 shard numbers, each once, soonest first: those of the blocks in which the lanes of these slots
        have this batch and their next `samples` samples. Into the next pass where this one ends before."""
        lanes = np.arange(first_slot // self._share, (last_slot - 1) // self._share + 1, dtype=np.int64)
        number, turn = divmod(batch, self._batches)
        view, left = turn * self._share, self._share + samples
        ahead: dict[int, None] = {}
        while left > 0 and len(ahead) < self._passes.shard_count:
            end = min(view + left, self._batches * self._share)
            first, last = (np.full_like(lanes, place) for place in self._views.places(view, end))
            ahead |= dict.fromkeys(self._passes.shards(number, lanes, first, last))
            left -= end - view
            number, view = number + 1, 0
        return np.fromiter(ahead, dtype=np.int64)


class _Shuffle(NamedTuple):
    """A pass's shards."""

    shards: np.ndarray  # their numbers, in the pass's order
    ends: np.ndarray  # where each ends in their concatenation
    rotation: int  # where in it the first lane starts


def _ranks_between(ends: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which stretches of a ring positions first[i] to last[i] - 1 lie in, for all i: their numbers, and the i of each.

    Stretch k ends before position ends[k]; numbers go on from len(ends) in the ring's second round.
    """
    total = int(ends[-1])
    bounds = np.stack([first, last - 1])
    low, high = bounds // total * len(ends) + np.searchsorted(ends, bounds % total, side="right")
    counts = high - low + 1
    which = np.repeat(np.arange(len(counts)), counts)
    return low[which] + np.arange(len(which)) - (np.cumsum(counts) - counts)[which], which


class SequentialOrder:
    """Each sample once, in the index's order, for evaluation; the last batch is filled up by repeats of the first."""

    epochs: int | None = 1
    lanes = 1
    sources = 1

    def __init__(self, counts: np.ndarray, global_batch: int) -> None:
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._total = int(self._ends[-1])
        self.block = global_batch
        self.batches_per_epoch = -(-self._total // global_batch)

    def epoch(self, batch: int) -> int:
        """The first is the only one."""
        return 0

    def refs(self, batch: int, first_slot: int, last_slot: int) -> Refs:
        """What stands in slots first_slot to last_slot - 1; the epoch is 0."""
        return self._at(batch * self.block + np.arange(first_slot, last_slot, dtype=np.int64))

    def candidates(self, batch: int, slot: int) -> Refs:
        """What to try in place of a bad sample: those that follow it."""
        following = np.arange(1, min(SUBSTITUTES, self._total - 1) + 1, dtype=np.int64)
        return self._at(batch * self.block + slot + following)

    def shards_ahead(self, batch: int, first_slot: int, last_slot: int, samples: int) -> np.ndarray:
        """int64 shard numbers, each once, soonest first: those of these slots and of the `samples` that follow."""
        first = batch * self.block + first_slot
        last = min(batch * self.block + last_slot + samples, self.batches_per_epoch * self.block)
        ranks, _ = _ranks_between(self._ends, np.array([first]), np.array([last]))
        return np.fromiter(dict.fromkeys((ranks % len(self._ends)).tolist()), dtype=np.int64)

    def _at(self, positions: np.ndarray) -> Refs:
        repeats, positions = np.divmod(positions, self._total)
        shard = np.searchsorted(self._ends, positions, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        return Refs(np.zeros_like(positions), (shard << 32) | (positions - starts[shard]), repeats)
