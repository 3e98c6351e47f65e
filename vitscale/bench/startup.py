"""`vitscale bench startup`: what rank 0 does with the index of very many shards before the first step.

Opening an index needs the size and time of every shard, so the floor is one os.stat call a shard; both take turns
in one process, and the ratio is of the best turns. Memory is the process's peak over the first opening, in bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitscale.bench.measuring import memory_status, reset_peak_memory
from vitscale.config.schema import Source
from vitscale.data.index import ShardIndex, open_index

_SHARD_BYTES = 10240  # of a shard that is never read


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="vitscale bench startup", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as folder:
        paths = _make_shards(Path(folder), options.shards)

        def opened() -> ShardIndex:
            return open_index((Source(f"{folder}/*.tar"),), None, Path(folder))

        before = reset_peak_memory()
        index = opened()
        peak = memory_status("VmHWM") - before
        assert index.total == options.shards
        best = dict.fromkeys(("stat", "open"), float("inf"))
        for _ in range(options.rounds):
            best["stat"] = min(best["stat"], _seconds(lambda: [os.stat(path) for path in paths]))
            best["open"] = min(best["open"], _seconds(opened))
        packed = index.to_bytes()
        unpack = min(_seconds(lambda: ShardIndex.from_bytes(packed)) for _ in range(options.rounds))
    result: dict[str, Any] = {
        "bench": "startup",
        "shards": options.shards,
        "stat_seconds": best["stat"],
        "open_seconds": best["open"],
        "ratio": best["open"] / best["stat"],
        "peak_memory_bytes": peak,
        "broadcast_bytes": len(packed),
        "from_bytes_seconds": unpack,
    }
    print(f"{options.shards:,} shards: os.stat of each {best['stat']:.3f} s, open_index {best['open']:.3f} s "
          f"({result['ratio']:.2f} times), {peak / 1e6:.0f} MB at its peak")  # fmt: skip
    print(f"for the other ranks: {len(packed) / 1e6:.1f} MB, read in {unpack:.3f} s")
    print(json.dumps(result))
    return 0


def _make_shards(folder: Path, count: int) -> list[str]:
    """Empty files with an index.json beside them; their paths."""
    paths, rows = [], []
    for i in range(count):
        path = folder / f"train-{i:06d}.tar"
        with open(path, "wb") as stream:
            stream.truncate(_SHARD_BYTES)
        paths.append(str(path))
        row = {"name": path.name, "samples": 1, "bytes": _SHARD_BYTES, "sha256": f"{i:064x}"}
        rows.append(json.dumps(row | {"mtime_ns": os.stat(path).st_mtime_ns}))
    lines = ",\n".join(rows)
    (folder / "index.json").write_text(f'{{"format": "vitscale-index-1", "shards": [\n{lines}\n]}}\n')
    return paths


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
