"""`vitscale bench startup`: from a run's command to its first step, by part; the index of very many shards; joining.

Opening an index needs the size and time of every shard, so one os.stat call a shard is its floor, to which the ratios
refer. Memory is the process's peak over the first opening.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vitscale.bench import launches
from vitscale.bench.joins import measure
from vitscale.bench.measuring import peak_memory, seconds, start_memory
from vitscale.bench.rounds import benchmark_parser, figures, in_turns, report
from vitscale.config.schema import Source
from vitscale.data.index import ShardIndex, open_index
from vitscale.data.index_file import Rows
from vitscale.files.store import LocalFiles
from vitscale.inference.command import above_zero
from vitscale.text import aligned

STAT, OPEN, RECEIVE = "os.stat of each shard", "rank 0: open_index", "other ranks: ShardIndex.from_bytes"
MESH, ON_DEMAND = "all at once", "on demand"
_SHARD_BYTES = 10240  # of a shard that is never read


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = benchmark_parser("startup", __doc__)
    parser.add_argument("--shards", type=above_zero, default=100_000, help="how many (default: %(default)s)")
    parser.add_argument("--joins", type=_counts, default=[], metavar="2,4,8", help="of so many ranks (default: none)")
    parser.add_argument("--preset", default="B", help="of the run: Ti, S, B, L, H, g or G (default: %(default)s)")
    parser.add_argument("--ranks", type=above_zero, default=2, help="of the run (default: %(default)s)")
    parser.add_argument(
        "--compile", action="store_true", help="the run with train.compile: cold, then with what it kept"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as folder:
        launched = launches.measure(options.preset, options.ranks, options.rounds, Path(folder), options.compile)
    rows = launches.table(launched)
    print(aligned(rows, right=range(1, len(rows[0]))))
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as folder:
        paths = _make_shards(Path(folder), options.shards)
        open_shards = partial(open_index, (Source(f"{folder}/*.tar"),), None, Path(folder))
        before = start_memory()
        index = open_shards()
        peak = peak_memory() - before
        assert index.total == options.shards
        packed = index.to_bytes()
        works: dict[str, Callable[[], object]] = {
            STAT: lambda: [os.stat(path) for path in paths],
            OPEN: open_shards,
            RECEIVE: partial(ShardIndex.from_bytes, packed),
        }
        times = in_turns({name: partial(seconds, work) for name, work in works.items()}, options.rounds)
    result = {
        "bench": "startup", **vars(options), "peak_memory_bytes": peak, "broadcast_bytes": len(packed),
        "contenders": figures(times, STAT),
    }  # fmt: skip
    title = (f"The index of {options.shards:,} shards: {peak / 1e6:.0f} MB at its peak, {len(packed) / 1e6:.1f} MB for "
             "each other rank")  # fmt: skip
    joins = {
        str(ranks): {way: measure(ranks, way == ON_DEMAND) for way in (MESH, ON_DEMAND)} for ranks in options.joins
    }
    rows = [["ranks", "gloo connects", "joining s", "first exchange s", "open files"]]
    for ranks, ways in joins.items():
        for way, took in ways.items():
            rows.append(
                [ranks, way, f"{took['joining']:.2f}", f"{took['first_exchange']:.2f}", f"{took['open_files']}"]
            )
    if options.joins:
        print(aligned(rows, right=(0, 2, 3, 4)))
    report(title, {"ms": "{median_ms:.1f}"}, result | {"joins": joins, "launches": launched})
    return 0


def _counts(text: str) -> list[int]:
    return [above_zero(each) for each in text.split(",")]


def _make_shards(folder: Path, count: int) -> list[str]:
    """Empty files with an index.json beside them; their paths."""
    paths = [str(folder / f"train-{i:06d}.tar") for i in range(count)]
    for path in paths:
        with open(path, "wb") as stream:
            stream.truncate(_SHARD_BYTES)
    sha256 = [hashlib.sha256(path.encode()).hexdigest() for path in paths]
    modified = np.array([os.stat(path).st_mtime_ns for path in paths])
    rows = Rows(paths, np.ones(count, np.int64), np.full(count, _SHARD_BYTES), sha256, modified)
    ShardIndex.of(rows, LocalFiles()).save(folder / "index.json")
    return paths
