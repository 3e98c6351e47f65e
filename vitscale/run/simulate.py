"""`vitscale simulate CONFIG`: what a run of many nodes would read, by its real order and cache rules, without a byte.

Of every node and rank, in the first epoch: which shards its lanes reach. Of some nodes, step by step: what their ranks
ask of the node's cache. Ranks are taken to go step by step together, and a download to be there at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from vitscale.config.check import check_config, too_few_lanes
from vitscale.config.schema import RunConfig
from vitscale.config.step import accumulation, auto_keys
from vitscale.data.index import ShardIndex
from vitscale.data.loader import fetched_ahead
from vitscale.data.mixture import is_mixture
from vitscale.data.order import Order, SampleOrder
from vitscale.data.shuffle import mixing
from vitscale.errors import ConfigError
from vitscale.files.cache import LruCache
from vitscale.files.disk_cache import used_longest_ago
from vitscale.files.store import is_remote
from vitscale.run.training_data import order_over
from vitscale.text import aligned
from vitscale.world import World

_ALL_LOOKED_AT = 2_000_000  # samples of a batch times steps, up to which every rank's are looked at
_MOST_ASKED = 40_000  # shards: a cache in which nothing stays is known for that before
_LANES = 16  # of a node, whose working sets are looked at
_PARTS = 8  # of an epoch, at whose starts they are
_TABLE_BYTES = 20  # a sample, compressed, as docs/runs.md has it
_SHUFFLE = "shuffle, beside a perfect one (neighbours: of a shard, in samples)"
_HEAD = ["", "least", "mean", "most"]
_PART = ", data.fraction and data.validation_fraction (all of the index is taken)"
Table = list[list[str]]
Sets = dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class Fleet:
    """A run's data, and the ranks that read them."""

    config: RunConfig
    index: ShardIndex
    order: SampleOrder
    nodes: int
    gpus: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def batch(self) -> int:
        return self.config.train.global_batch

    @property
    def lane_share(self) -> int:
        """Slots of a lane in a batch."""
        return self.batch // self.order.lanes

    @property
    def sampled(self) -> list[int]:
        """The nodes that are followed: the first, the middle one, the last."""
        return sorted({0, self.nodes // 2, self.nodes - 1})

    def slots(self, first_rank: int, last_rank: int) -> tuple[int, int]:
        """The slots of some ranks side by side: the first, and the one after the last."""
        return first_rank * self.batch // self.ranks, last_rank * self.batch // self.ranks

    def slots_of(self, node: int) -> tuple[int, int]:
        return self.slots(node * self.gpus, (node + 1) * self.gpus)

    @property
    def ahead(self) -> tuple[int, int]:
        """See fetched_ahead."""
        return fetched_ahead(self.order, int(self.index.samples.max()), self.batch, self.ranks)

    def epoch_of(self, slots: tuple[int, int]) -> np.ndarray:
        """The shards that lanes of these slots reach in the first epoch: int64."""
        return self.order.shards_ahead(0, *slots, (self.order.batches_per_epoch - 1) * self.lane_share)


def simulate(config: RunConfig, index: ShardIndex, nodes: int, gpus: int, steps: int) -> str:
    """The tables, as text. steps: of the nodes that are followed. ConfigError as for the run itself."""
    check_config(config, World(world_size=nodes * gpus))
    mixed = is_mixture(config.data.train)
    if mixed and not index.sources:
        index = index.by_sources(config.data.train)  # an index file does not tell them apart
    fleet = Fleet(config, index, order_over(config, index, None), nodes, gpus)
    steps = min(steps, 2 * fleet.order.batches_per_epoch)  # the second shows what the cache still has of the first
    at_once = _working_sets(fleet)
    is_part = config.data.fraction < 1 or config.data.validation_fraction > 0
    parts = [
        "\n".join([*_described(fleet), *_warnings(fleet, at_once)]),
        _titled("the first epoch", _epoch(fleet)),
        _caches(fleet, steps),
        _titled("in use or fetched ahead at once", _as_rows(fleet, at_once)),
        _titled("until the first batch", _start(fleet)),
        f"each sample once: {_once(fleet, steps)}",
        *([] if mixed else [_titled(_SHUFFLE, _shuffles(fleet))]),
        "not known here: bandwidth and latency of storage and network, time to decode, which samples are bad, how the\n"
        "ranks of a node interleave within a step" + (_PART if is_part else ""),
    ]
    return "\n\n".join(parts)


def _warnings(fleet: Fleet, at_once: Sets) -> Iterator[str]:
    if few := too_few_lanes(fleet.config, World(world_size=fleet.ranks)):
        yield f"warning: {few}"
    most, needed = fleet.config.data.cache_bytes, max(int(fleet.index.bytes[each].sum()) for each in at_once["a node"])
    if most is not None and most < needed:
        yield (
            f"warning: data.cache_bytes={most}: the lanes of a node have {needed} bytes of shards in use or fetched "
            "ahead at once, so that they are downloaded again and again; raise it, or for a new run lower data.lanes "
            "or data.window"
        )


def _titled(title: str, rows: Sequence[Sequence[str]]) -> str:
    return f"{title}\n{aligned(rows, right=range(1, len(rows[0])))}"


def _described(fleet: Fleet) -> Iterator[str]:
    config, index, order = fleet.config, fleet.index, fleet.order
    steps = order.batches_per_epoch
    left = index.total * config.augment.repeats - steps * fleet.batch
    over = "" if is_mixture(config.data.train) else f", {left:,} samples left over"
    yield f"data: {index.total:,} samples in {len(index.names):,} shards, {_bytes(int(index.bytes.sum()))}"
    parts = "as micro-batches that the run chooses"
    if "train.micro_batch" not in auto_keys(config):
        parts = (
            f"{accumulation(config, World(world_size=fleet.ranks))} micro-batch(es) of {config.train.micro_batch} each"
        )
    yield f"a step: {fleet.batch:,} images, on {fleet.nodes:,} x {fleet.gpus} ranks {parts}"
    yield (f"order: {order.lanes:,} lanes, blocks of {order.block:,} samples; {steps:,} steps an epoch{over}")
    if not is_remote(index.paths[0]):
        yield "the shards are no URLs, which alone data.cache is for: what is said of it is as if they were"


def _epoch(fleet: Fleet) -> Table:
    """How many open each shard, and what that comes to for a node."""
    shards, node_bytes = len(fleet.index.names), []
    by_node, by_rank = np.zeros(shards, np.int64), np.zeros(shards, np.int64)
    for node in range(fleet.nodes):
        reached = fleet.epoch_of(fleet.slots_of(node))
        by_node[reached] += 1
        node_bytes.append(int(fleet.index.bytes[reached].sum()))
    # Ranks that share their lanes reach the same shards.
    spans = Counter(tuple(slot // fleet.lane_share for slot in (first, last - 1))
                    for first, last in (fleet.slots(rank, rank + 1) for rank in range(fleet.ranks)))  # fmt: skip
    for (first, last), ranks in spans.items():
        by_rank[fleet.epoch_of((first * fleet.lane_share, (last + 1) * fleet.lane_share))] += ranks
    size = int(fleet.index.bytes.sum())
    return [
        _HEAD,
        ["nodes that open a shard", *_spread(by_node)],
        ["ranks that open a shard", *_spread(by_rank)],
        ["bytes a node downloads, with a cache that holds them", *_spread(np.array(node_bytes), _bytes)],
        ["bytes a node needs: its samples alone", "", _bytes(size / fleet.nodes), ""],
        ["downloads of all nodes, over the bytes of the data", "", f"{sum(node_bytes) / size:.2f}", ""],
    ]


class _Node:
    """What one node's cache holds while its ranks read: files/disk_cache.py's rules, without files."""

    def __init__(self, fleet: Fleet, node: int) -> None:
        self._fleet, self._node = fleet, node
        self._used: dict[int, int] = {}  # shard -> when it was last used, of those that are there
        self._held = self._clock = 0
        self.most = self.asked = self.there = self.again = self.bytes = 0
        self._downloaded: set[int] = set()
        _, kept = fleet.ahead
        self._ranks = range(node * fleet.gpus, (node + 1) * fleet.gpus)
        self._opened: dict[int, set[int]] = {rank: set() for rank in self._ranks}
        # As data/shards.py keeps tables and asks for those ahead: a shard is fetched with its table.
        self._ahead: dict[int, frozenset[int]] = dict.fromkeys(self._ranks, frozenset())
        self._tables = {rank: LruCache(partial(self._table, rank), kept, int) for rank in self._ranks}

    def step(self, batch: int) -> None:
        """All ranks fetch ahead, then read."""
        fleet = self._fleet
        first, last = fleet.slots_of(self._node)
        shards = fleet.order.refs(batch, first, last).ids >> 32
        for rank in self._ranks:
            own_first, own_last = fleet.slots(rank, rank + 1)
            ahead = fleet.order.shards_ahead(batch, own_first, own_last, fleet.ahead[0]).tolist()
            for shard in ahead:
                if shard not in self._ahead[rank]:
                    self._tables[rank].get(shard)
            self._ahead[rank] = frozenset(ahead)
            for shard in shards[own_first - first : own_last - first].tolist():
                self._tables[rank].get(shard)
                self._read(rank, shard)

    def _table(self, rank: int, shard: int) -> int:
        self._opened[rank].discard(shard)
        self._read(rank, shard)
        return int(self._fleet.index.samples[shard])

    def _read(self, rank: int, shard: int) -> None:
        """As DiskCache.read: a file is used whenever it is read (there it says so once a minute, which comes to the
        same), and asked for when a process fetches it, or reads it after it was thrown out."""
        self._clock += 1
        is_asked = shard not in self._opened[rank] or shard not in self._used
        self.asked += is_asked
        self.there += is_asked and shard in self._used
        if shard not in self._used:
            self._download(shard)
        self._used[shard] = self._clock
        self._opened[rank].add(shard)

    def _download(self, shard: int) -> None:
        sizes, most = self._fleet.index.bytes, self._fleet.config.data.cache_bytes
        size = int(sizes[shard])
        if most is not None and self._held + size > most:
            files = [(each, int(sizes[each]), used) for each, used in self._used.items()]
            for old in used_longest_ago(files, self._held + size - most):
                del self._used[old]
                self._held -= int(sizes[old])
        self._held += size
        self.most = max(self.most, self._held)
        self.bytes += size
        self.again += shard in self._downloaded
        self._downloaded.add(shard)

    @property
    def row(self) -> list[str]:
        hits = f"{self.there / max(1, self.asked):.1%}"
        return [f"node {self._node}", f"{self.asked:,}", hits, _bytes(self.bytes), f"{self.again:,}", _bytes(self.most)]


def _caches(fleet: Fleet, steps: int) -> str:
    most, largest = fleet.config.data.cache_bytes, int(fleet.index.bytes.max())
    if most is not None and largest > most:
        raise ConfigError(
            f"data.cache_bytes={most}: a shard alone has {largest}; allow for several of its size, or set it to null"
        )
    nodes, step = [_Node(fleet, node) for node in fleet.sampled], 0
    while step < steps and sum(node.asked for node in nodes) < _MOST_ASKED:
        for node in nodes:
            node.step(step)
        step += 1
    bound = "without bound" if most is None else f"of {_bytes(most)}"
    head = [bound, "shards asked for", "there", "downloaded", "shards again", "most held"]
    return _titled(f"the cache of a node (data.cache) in {step:,} steps", [head, *(node.row for node in nodes)])


def _working_sets(fleet: Fleet) -> Sets:
    """The shards of some lanes, and of the nodes that are followed, at some steps of the first epoch."""
    share, steps = fleet.lane_share, fleet.order.batches_per_epoch
    found: Sets = {"a lane": [], "a node": []}
    for batch in sorted({steps * part // _PARTS for part in range(_PARTS)}):
        for node in fleet.sampled:
            first, last = fleet.slots_of(node)
            found["a node"].append(fleet.order.shards_ahead(batch, first, last, fleet.ahead[0]))
            own = np.unique(np.arange(first, last) // share)
            for lane in own[:: -(-len(own) // _LANES)].tolist():
                slots = (lane * share, (lane + 1) * share)
                found["a lane"].append(fleet.order.shards_ahead(batch, *slots, fleet.ahead[0]))
    return found


def _as_rows(fleet: Fleet, sets: Sets) -> Table:
    rows = [_HEAD]
    for name, found in sets.items():
        rows.append([f"shards of {name}", *_spread(np.array([len(each) for each in found]))])
        rows.append([f"bytes of {name}", *_spread(np.array([fleet.index.bytes[each].sum() for each in found]), _bytes)])
    return rows


def _start(fleet: Fleet) -> Table:
    tables, samples, shard_bytes, needed = [], [], [], []
    mean = fleet.index.bytes.sum() / fleet.index.total
    for node in fleet.sampled:
        first, last = fleet.slots_of(node)
        read = np.unique(fleet.order.refs(0, first, last).ids >> 32)
        shard_bytes.append(int(fleet.index.bytes[read].sum()))
        needed.append((last - first) * mean)
        for rank in range(node * fleet.gpus, (node + 1) * fleet.gpus):
            ahead = fleet.order.shards_ahead(0, *fleet.slots(rank, rank + 1), fleet.ahead[0])
            tables.append(len(ahead))
            samples.append(int(fleet.index.samples[ahead].sum()))
    table_bytes = np.array(samples) * _TABLE_BYTES
    return [
        _HEAD,
        ["bytes of the index, broadcast to every rank", "", _bytes(len(fleet.index.to_bytes())), ""],
        ["tables that a rank reads (or makes of a shard's headers)", *_spread(np.array(tables))],
        [f"bytes of them, at {_TABLE_BYTES} a sample", *_spread(table_bytes, _bytes)],
        ["bytes that a node downloads first, with a cache", *_spread(np.array(shard_bytes), _bytes)],
        ["bytes of its first batch", *_spread(np.array(needed), _bytes)],
    ]


def _once(fleet: Fleet, steps: int) -> str:
    """Whether a sample comes twice in an epoch: of all ranks where that is quickly told, else of the followed nodes."""
    whole = fleet.order.batches_per_epoch
    everyone = whole * fleet.batch <= _ALL_LOOKED_AT
    steps = whole if everyone else min(steps, whole)
    seen = []
    for batch in range(steps):
        for first, last in [(0, fleet.batch)] if everyone else map(fleet.slots_of, fleet.sampled):
            refs = fleet.order.refs(batch, first, last)
            seen.append(refs.keys(0)[refs.repeats == 0])  # of a mixture in each of its source's epochs
    ids = np.concatenate(seen)
    twice = len(ids) - len(np.unique(ids))
    whose = (
        "all ranks in the first epoch"
        if everyone
        else f"the {len(fleet.sampled)} nodes in {steps:,} steps of the first epoch"
    )
    return f"of the {len(ids):,} samples of {whose} {twice or 'none'} come{'' if twice > 1 else 's'} twice"


def _shuffles(fleet: Fleet) -> Table:
    """With the config's lanes and window, and with a sixteenth of each."""
    config, counts, batch = fleet.config, fleet.index.samples, fleet.batch
    own, window = fleet.order.lanes, min(config.data.window, fleet.index.total)
    few = max(each for each in range(1, max(1, own // 16) + 1) if batch % each == 0)
    rows = [["lanes", "window", "shards in use", "a batch has", "perfect", "neighbours apart", "perfect"]]
    for lanes, some in dict.fromkeys((lanes, some) for lanes in (own, few) for some in (window, max(1, window // 16))):
        order, found = (
            Order(counts, config.run.seed, batch, lanes, some),
            mixing(counts, config.run.seed, batch, lanes, some),
        )
        ahead, _ = fetched_ahead(order, int(counts.max()), batch, fleet.ranks)
        in_use = len(order.shards_ahead(0, 0, batch, ahead))
        apart = "not told" if np.isnan(found.apart) else f"{found.apart:,.0f}"
        shards = (f"{in_use:,}", f"{found.shards:,.1f}", f"{found.perfect_shards:,.1f}")
        rows.append([f"{lanes:,}", f"{some:,}", *shards, apart, f"{found.perfect_apart:,.0f}"])
    return rows


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _spread(values: np.ndarray, say: Callable[[float], str] = _number) -> list[str]:
    """Least, mean, most."""
    return [say(float(value)) for value in (values.min(), values.mean(), values.max())]


def _bytes(count: float) -> str:
    """In powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
