"""Which samples make up global batch t: pure functions of (seed, epoch, batch, slot).

Nothing is stored and any position costs the same, so a run's place in the data is one integer:
samples consumed. Sample ids are shard << 32 | place in the shard.
"""

from __future__ import annotations

import numpy as np

from vitscale import rng
from vitscale.errors import DataError

SUBSTITUTES = 64  # samples tried in the place of a bad one before the data are called unreadable
_LARGEST = np.iinfo(np.int64).max


class Order:
    """Shuffled epochs in L parallel lanes.

    An epoch permutes the shards; their concatenation, rotated by a hash, is cut into L equal lanes of
    samples. A lane's blocks of window / L samples are each permuted by hash. Global batch t takes B / L
    samples of each lane in turn: slot s lies in lane s // (B / L). Of an epoch's N samples each comes
    once but for a dropped tail smaller than B + L, another one every epoch.
    """

    epochs: int | None = None  # endless

    def __init__(self, counts: np.ndarray, seed: int, global_batch: int, lanes: int, window: int) -> None:
        """counts: int64 [shards], samples in each; window: samples over all lanes. lanes divides global_batch."""
        assert global_batch % lanes == 0, "config/check.py refuses lanes that do not divide the batch"
        self._counts = np.asarray(counts, dtype=np.int64)
        self._total = int(self._counts.sum())
        if self._total < global_batch + lanes:
            raise DataError(
                f"train.global_batch={global_batch}: the data hold {self._total} samples, an epoch needs at least "
                f"train.global_batch + data.lanes = {global_batch + lanes}; lower train.global_batch or add shards"
            )
        self._seed, self._lanes = seed, lanes
        self._share = global_batch // lanes  # samples of one lane in a batch
        self._lane_length = self._total // lanes
        self._block = min(max(1, window // lanes), self._lane_length)
        # The last block takes the remainder, so that no block is too small to replace a bad sample in.
        self._blocks = self._lane_length // self._block
        self.batches_per_epoch = self._lane_length // self._share
        self._shuffles: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}

    def refs(self, batch: int, first_slot: int, last_slot: int) -> tuple[int, np.ndarray]:
        """Epoch, and the ids (int64) of slots first_slot to last_slot - 1 of a batch counted over all epochs."""
        epoch, lane, place = self._locate(batch, np.arange(first_slot, last_slot, dtype=np.int64))
        return epoch, self._ids(epoch, lane, self._permuted(epoch, lane, place))

    def candidates(self, batch: int, slot: int) -> np.ndarray:
        """Ids (int64) to try in place of a bad sample: the others of its block in hashed order, from the next one on.

        Where the block holds too few, those of the blocks after it follow.
        """
        epoch, lane, place = self._locate(batch, np.array([slot], dtype=np.int64))
        start, length = self._block_of(place)
        others = start + (place - start + np.arange(1, length[0])) % length
        after = (start + length + np.arange(min(SUBSTITUTES, self._lane_length - length[0]))) % self._lane_length
        places = np.concatenate([others, after])[:SUBSTITUTES]
        lanes = np.full(len(places), lane[0])
        return self._ids(epoch, lanes, self._permuted(epoch, lanes, places))

    def shards_ahead(self, batch: int, first_slot: int, last_slot: int, samples: int) -> np.ndarray:
        """int64 shard numbers, each once, soonest first: those of the blocks in which the lanes of these slots have
        this batch and their next `samples` samples."""
        epoch, lanes, places = self._locate(batch, np.arange(first_slot, last_slot, dtype=np.int64))
        first, last = int(places.min()), int(places.max()) + samples
        ids: list[np.ndarray] = []
        while last >= 0 and len(ids) < 3:
            end = min(last, self._lane_length - 1)
            bounds, lengths = self._block_of(np.array([first, end]))
            place, lane = np.meshgrid(np.arange(bounds[0], bounds[1] + lengths[1]), np.unique(lanes), indexing="ij")
            ids.append(self._ids(epoch, lane.ravel(), place.ravel()))
            epoch, first, last = epoch + 1, 0, last - self._lane_length
        return _each_once(np.concatenate(ids) >> 32)

    def _locate(self, batch: int, slots: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Epoch; lane and place in the lane's hashed order of each slot."""
        epoch, turn = divmod(batch, self.batches_per_epoch)
        return epoch, slots // self._share, turn * self._share + slots % self._share

    def _block_of(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First place and length of the block that each place lies in."""
        block = np.minimum(places // self._block, self._blocks - 1)
        start = block * self._block
        return start, np.where(block == self._blocks - 1, self._lane_length - start, self._block)

    def _permuted(self, epoch: int, lanes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Where in its lane the sample lies that comes at each place of the hashed order."""
        if len(places) == 0:
            return places
        starts, lengths = self._block_of(places)
        blocks, which = np.unique(np.stack([lanes, starts, lengths]), axis=1, return_inverse=True)
        lane, start, length = blocks
        keys = rng.fold(rng.fold(lane, rng.key("window", self._seed, epoch)), start)
        width = int(length.max())
        hashes = rng.bits(keys, width)
        hashes[np.arange(width) >= length[:, None]] = _LARGEST  # beyond a shorter block's end
        permutations = np.argsort(hashes, axis=1, kind="stable")
        return starts + permutations[which, places - starts]

    def _ids(self, epoch: int, lanes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Sample ids at unhashed places of lanes."""
        shards, ends, rotation = self._shuffle(epoch)
        position = (lanes * self._lane_length + places + rotation) % self._total
        rank = np.searchsorted(ends, position, side="right")
        shard = shards[rank]
        return (shard << 32) | (position - (ends[rank] - self._counts[shard]))

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """An epoch's shards in their order, where each ends in the concatenation, and its rotation."""
        known = self._shuffles.get(epoch)
        if known is None:
            shards = rng.permutation(len(self._counts), rng.key("shards", self._seed, epoch))
            rotation = rng.key("rotation", self._seed, epoch) % self._total
            known = shards, np.cumsum(self._counts[shards]), rotation
            # Batches read ahead cross an epoch's border, so the one before stays known.
            self._shuffles = {e: s for e, s in self._shuffles.items() if abs(e - epoch) == 1} | {epoch: known}
        return known


class SequentialOrder:
    """Each sample once, in the index's order, for evaluation; the last batch is filled up by repeating."""

    epochs: int | None = 1

    def __init__(self, counts: np.ndarray, global_batch: int) -> None:
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._total = int(self._ends[-1])
        self._batch = global_batch
        self.batches_per_epoch = -(-self._total // global_batch)

    def refs(self, batch: int, first_slot: int, last_slot: int) -> tuple[int, np.ndarray]:
        """Epoch (0), and the ids (int64) of slots first_slot to last_slot - 1."""
        return 0, self._ids(batch * self._batch + np.arange(first_slot, last_slot, dtype=np.int64))

    def candidates(self, batch: int, slot: int) -> np.ndarray:
        """Ids (int64) to try in place of a bad sample: those that follow it."""
        following = np.arange(1, min(SUBSTITUTES, self._total - 1) + 1, dtype=np.int64)
        return self._ids(batch * self._batch + slot + following)

    def shards_ahead(self, batch: int, first_slot: int, last_slot: int, samples: int) -> np.ndarray:
        """int64 shard numbers, each once, soonest first: those of these slots and of the `samples` that follow."""
        first, last = batch * self._batch + first_slot, batch * self._batch + last_slot + samples
        last = min(last, self.batches_per_epoch * self._batch)
        return _each_once(self._ids(np.arange(first, last, dtype=np.int64)) >> 32)

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        positions = positions % self._total
        shard = np.searchsorted(self._ends, positions, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        return (shard << 32) | (positions - starts[shard])


def _each_once(numbers: np.ndarray) -> np.ndarray:
    """Without repetitions, in the order in which they come first."""
    return numbers[np.sort(np.unique(numbers, return_index=True)[1])]
