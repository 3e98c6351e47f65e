"""Several sources in one order, each with its share of every batch and its own epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vitscale import rng
from vitscale.config.check import lanes as lanes_of
from vitscale.config.schema import RunConfig, Source
from vitscale.data.order import Order, Passes, Refs, SampleOrder, Views
from vitscale.errors import DataError

_SHORTEST, _EXACT = 64, 1024  # places of a period of a lane; _EXACT: where shares are looked for that it says exactly
_RAREST, _TABLE = 64, 1 << 23  # places of the rarest source; places times sources at most
_WRONG = 0.05  # of its share, by which a source may be more


def training_order(config: RunConfig, counts: np.ndarray, sources: Sequence[int]) -> SampleOrder:
    """The order that a config asks for. counts: int64 [shards], samples in each; sources: how many of these shards, in
    their order, each entry of data.train stands for."""
    train, data, repeats = config.train, config.data, config.augment.repeats
    lanes = lanes_of(config)
    if not is_mixture(data.train):
        return Order(counts, config.run.seed, train.global_batch, lanes, data.window, repeats, data.epoch_samples)
    parts = np.split(np.asarray(counts, dtype=np.int64), np.cumsum(sources)[:-1])
    _require_samples(data.train, parts)
    times = _times(data.train, [int(part.sum()) for part in parts])
    _require_shares(data.train, parts, times)
    return Mixture(parts, times, config.run.seed, train.global_batch, lanes, data.window, repeats, data.epoch_samples)


def is_mixture(sources: Sequence[Source]) -> bool:
    """Whether sources have shares of their own; else their shards are one set, each shard read once an epoch."""
    return len(sources) > 1 and any((source.weight, source.repeat) != (None, None) for source in sources)


def _times(sources: Sequence[Source], samples: Sequence[int]) -> list[float]:
    """How often each source comes in an epoch of all; by weight, that is as many samples as all hold together."""
    if all(source.weight is None for source in sources):
        return [source.repeat or 1.0 for source in sources]
    weights = [source.weight or 0.0 for source in sources]
    return [weight / sum(weights) * sum(samples) / count for weight, count in zip(weights, samples, strict=True)]


def _require_samples(sources: Sequence[Source], parts: Sequence[np.ndarray]) -> None:
    for source, counts in zip(sources, parts, strict=True):
        if counts.sum() < 2:
            raise DataError(
                f"data.train: pattern={source.pattern}: holds {counts.sum()} samples, and a source needs two; "
                "leave it out, or name more shards"
            )


def _require_shares(sources: Sequence[Source], parts: Sequence[np.ndarray], times: Sequence[float]) -> None:
    """DataError where a source is so small beside the others that it would come more often than it is to."""
    drawn = [float(part.sum()) * each for part, each in zip(parts, times, strict=True)]
    shares = [each / sum(drawn) for each in drawn]
    counts = whole_counts(shares)
    for source, share, count in zip(sources, shares, counts, strict=True):
        if count / sum(counts) > share * (1 + _WRONG):
            raise DataError(
                f"data.train: pattern={source.pattern}: its share of the samples would be {share:.2g}, and one of "
                f"{len(counts)} sources gets {1 / sum(counts):.2g} or more; raise its weight or repeat, or put it into "
                "another source's pattern"
            )


class Mixture:
    """Each lane takes from the sources in turn, by a pattern of P places in which source i has n_i.

    The pattern is a hashed arrangement, and lane l starts l / L of the way into it, so that a batch has the shares to
    within a few samples. By its position k a lane has had count_i(k) = (k div P) n_i + prefix_i[k mod P] of source i,
    so any position costs the same and the run's place in the data stays one integer. Each source has passes of its own
    (`Passes`), over as many lanes as divide L and leave it 2 samples in each; the lanes here that share one of these
    take from it in turn.
    """

    epochs: int | None = None  # endless

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        times: Sequence[float],
        seed: int,
        global_batch: int,
        lanes: int,
        window: int,
        repeats: int = 1,
        epoch_samples: int | None = None,
    ) -> None:
        """parts: int64 [shards] a source, samples in each of its shards, 2 or more together, numbered on from source to
        source; times: how often each comes in an epoch; the others: as of an Order."""
        drawn = [float(part.sum()) * each for part, each in zip(parts, times, strict=True)]
        counts = whole_counts([each / sum(drawn) for each in drawn])
        period = sum(counts)
        self.lanes, self.sources = lanes, len(parts)
        self._share = global_batch // lanes
        self._views = Views(self._share, repeats)
        self._counts_samples = epoch_samples is not None
        self.batches_per_epoch = max(1, (epoch_samples or round(sum(drawn))) // global_batch)
        arranged = rng.permutation(period, rng.key("mixture", seed))
        self._pattern = np.repeat(np.arange(len(counts)), counts)[arranged]
        self._counts = np.array(counts, dtype=np.int64)
        self._prefix = np.zeros((len(counts), period + 1), dtype=np.int32)
        np.cumsum(self._pattern == np.arange(len(counts))[:, None], axis=1, out=self._prefix[:, 1:])
        self._offsets = np.arange(lanes, dtype=np.int64) * period // lanes
        self._first_shards = np.cumsum([0, *(len(part) for part in parts)])[:-1].tolist()
        self._passes = [
            self._passes_of(part, rng.key("source", seed, number), window * count // period)
            for number, (part, count) in enumerate(zip(parts, counts, strict=True))
        ]
        self.block = max(1, window // lanes)

    def _passes_of(self, part: np.ndarray, seed: int, window: int) -> Passes:
        lanes = next(
            number for number in range(self.lanes, 0, -1) if self.lanes % number == 0 and 2 * number <= part.sum()
        )
        return Passes(part, seed, lanes, window)

    def epoch(self, batch: int) -> int:
        """Of data.epoch_samples where it is set, else the least that a source has reached when a batch begins."""
        if self._counts_samples:
            return batch // self.batches_per_epoch
        place, _ = self._views.places(batch * self._share, batch * self._share + 1)
        lanes = np.arange(self.lanes)
        return min(
            int(self._at(source, lanes, self._taken(source, lanes, place))[0].min()) for source in range(self.sources)
        )

    def refs(self, batch: int, first_slot: int, last_slot: int) -> Refs:
        """What stands in slots first_slot to last_slot - 1 of a batch."""
        slots = np.arange(first_slot, last_slot, dtype=np.int64)
        lanes = slots // self._share
        places, repeats = self._views.shown(batch * self._share + slots % self._share)
        sources = self._pattern[(places + self._offsets[lanes]) % len(self._pattern)]
        epochs, ids = np.zeros_like(slots), np.zeros_like(slots)
        for source in np.unique(sources).tolist():
            own = np.flatnonzero(sources == source)
            numbers, source_lanes, at = self._at(source, lanes[own], self._taken(source, lanes[own], places[own]))
            epochs[own] = numbers
            for number in np.unique(numbers).tolist():
                chosen = numbers == number
                ids[own[chosen]] = self._passes[source].ids(number, source_lanes[chosen], at[chosen])
            ids[own] += self._first_shards[source] << 32
        return Refs(epochs, ids, repeats)

    def candidates(self, batch: int, slot: int) -> Refs:
        """What to try in place of a bad sample: others of its source and pass, see `Passes.others`."""
        lane = np.array([slot // self._share])
        place, repeat = self._views.shown(np.array([batch * self._share + slot % self._share]))
        source = int(self._pattern[(place + self._offsets[lane]) % len(self._pattern)][0])
        number, source_lane, at = (int(each[0]) for each in self._at(source, lane, self._taken(source, lane, place)))
        ids = self._passes[source].others(number, source_lane, at) + (self._first_shards[source] << 32)
        return Refs(np.full_like(ids, number), ids, np.full_like(ids, int(repeat[0])))

    def shards_ahead(self, batch: int, first_slot: int, last_slot: int, samples: int) -> np.ndarray:
        """int64 shard numbers, each once, soonest first: those of the blocks in which the lanes of these slots have
        this batch and their next `samples` samples."""
        lanes = np.arange(first_slot // self._share, (last_slot - 1) // self._share + 1, dtype=np.int64)
        view = batch * self._share
        first, last = self._views.places(view, view + self._share + samples)
        ahead: list[tuple[float, int]] = []  # how far ahead each is needed, and its number
        for source, offset in enumerate(self._first_shards):
            shards = self._ahead_of(source, lanes, first, last)
            ahead += [(place / len(shards), shard + offset) for place, shard in enumerate(shards)]
        return np.array([shard for _, shard in sorted(ahead, key=lambda each: each[0])], dtype=np.int64)

    def _ahead_of(self, source: int, lanes: np.ndarray, first: int, last: int) -> list[int]:
        passes = self._passes[source]
        begin, end = self._taken(source, lanes, first), self._taken(source, lanes, last)
        lanes, begin, end = (each[end > begin] for each in (lanes, begin, end))
        if not len(lanes):
            return []
        from_number, source_lanes, from_place = self._at(source, lanes, begin)
        to_number, _, to_place = self._at(source, lanes, end - 1)
        shards: dict[int, None] = {}
        for number in range(int(from_number.min()), int(to_number.max()) + 1):
            here = (from_number <= number) & (number <= to_number)
            start = np.where(from_number == number, from_place, 0)[here]
            stop = np.where(to_number == number, to_place + 1, passes.lane_length)[here]
            shards |= dict.fromkeys(passes.shards(number, source_lanes[here], start, stop))
            if len(shards) == passes.shard_count:
                break
        return list(shards)

    def _taken(self, source: int, lanes: np.ndarray, places: np.ndarray | int) -> np.ndarray:
        """How many samples of a source lanes have had before a position each; int64 [n]."""
        begin = self._offsets[lanes]
        whole, rest = np.divmod(begin + places, len(self._pattern))
        return whole * self._counts[source] + self._prefix[source, rest] - self._prefix[source, begin]

    def _at(self, source: int, lanes: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pass, lane of the source, place in it) of the sample that comes to a lane after so many; int64 [n] each."""
        passes = self._passes[source]
        sharing = self.lanes // passes.lanes
        numbers, places = np.divmod(taken * sharing + lanes % sharing, passes.lane_length)
        return numbers, lanes // sharing, places


def whole_counts(weights: Sequence[float]) -> list[int]:
    """How often each source stands in a period: exactly by its share where a period of up to 1,024 can say it, else in
    one in which the rarest stands some 64 times, of at most 2^23 places times sources; once at least. Periods are 64 or
    more: neighbours, which mixup joins, are of all pairs of sources."""
    for period in range(len(weights), _EXACT + 1):
        counts = [round(weight * period) for weight in weights]
        if sum(counts) == period and all(
            math.isclose(count, weight * period, rel_tol=1e-9) for count, weight in zip(counts, weights, strict=True)
        ):
            return [count * -(-_SHORTEST // period) for count in counts]
    most = max(_EXACT, _TABLE // len(weights))
    period = int(min(most, max(_EXACT, _RAREST / min(weights))))
    counts = [max(1, int(weight * period)) for weight in weights]
    lacking = [weight * period - count for weight, count in zip(weights, counts, strict=True)]
    for number in np.argsort(lacking)[::-1][: max(0, period - sum(counts))]:
        counts[int(number)] += 1
    return counts
