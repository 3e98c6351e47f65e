"""`vitscale simulate` against what real ranks, caches and brute force do."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.makers import write_shards
from tests.data.stores import CountingFiles
from vitscale.cli import main
from vitscale.config.load import config_of
from vitscale.config.schema import RunConfig, Source
from vitscale.data import shards as shards_module
from vitscale.data.index import ShardIndex, open_index
from vitscale.data.index_file import Rows
from vitscale.data.mixture import training_order
from vitscale.data.shards import Shards
from vitscale.data.shuffle import _perfect_shards, mixing
from vitscale.errors import ConfigError
from vitscale.files import disk_cache
from vitscale.files.disk_cache import DiskCache
from vitscale.files.stores import Stores
from vitscale.run.simulate import Fleet, _epoch, _Node, simulate


def config_with(*keys: str) -> RunConfig:
    return config_of({}, ["train.global_batch=16", "train.micro_batch=2", "train.steps=9", "data.window=32", *keys])


def index_of(shards: int, samples: int, size: int = 1000) -> ShardIndex:
    paths = [f"s3://bucket/s{shard:05d}.tar" for shard in range(shards)]
    counts = np.full(shards, samples) + np.arange(shards) % 3
    rows = Rows(paths, counts, counts * size, [None] * shards, np.zeros(shards, np.int64))
    return ShardIndex.of(rows, Stores())


def fleet_of(config: RunConfig, index: ShardIndex, nodes: int, gpus: int) -> Fleet:
    return Fleet(config, index, training_order(config, index.samples, index.sources), nodes, gpus)


@pytest.mark.parametrize("room", [2.5, 4.5, 100.0])
def test_a_node_downloads_what_the_real_cache_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float
) -> None:
    """Two ranks, each with its own Shards and DiskCache on one folder, over three epochs."""
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [20] * 8, labels=False)
    for table in (tmp_path / "shards" / "index.tables").iterdir():
        table.unlink()
    far = CountingFiles(read_only=str(tmp_path / "shards"))  # so that tables do not lie in the cache beside the shards
    index = open_index((Source(f"{tmp_path}/shards/*.tar"),), None, tmp_path / "tables", store=far)
    index.complete_tables("cls")
    most = int(room * index.bytes.max())
    config = config_with("data.lanes=2", "data.window=16", f"data.cache_bytes={most}")
    fleet = fleet_of(config, index, 1, 2)
    node, order = _Node(fleet, 0), fleet.order

    clock, utime = iter(range(10**6)), os.utime  # the kernel's own clock stands still for milliseconds
    monkeypatch.setattr(disk_cache.os, "utime", lambda path: utime(path, ns=(moment := next(clock), moment)))
    monkeypatch.setattr(disk_cache, "_TOUCHED_EVERY_S", 0.0)
    monkeypatch.setattr(shards_module, "_FETCHING", 1)
    ranks = []
    for _ in range(2):
        own = replace(index, store=DiskCache(far, str(tmp_path / "cache"), most))
        ranks.append(Shards(own, "cls", fleet.ahead[1]))
    far.reads.clear()
    for batch in range(3 * order.batches_per_epoch):
        node.step(batch)
        for rank, shards in enumerate(ranks):
            first, last = fleet.slots(rank, rank + 1)
            shards.fetch(order.shards_ahead(batch, first, last, fleet.ahead[0]).tolist())
            shards._fetching.submit(int).result()  # after those before it
            for sample in order.refs(batch, first, last).ids.tolist():
                shards.read(sample)
        assert sum(far.reads.values()) == len(node._downloaded) + node.again, f"in step {batch}"
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.data"))
    assert held == node._held <= node.most <= most
    assert (node.again > 0) == (room < 8)


def test_who_opens_a_shard_is_who_has_its_samples() -> None:
    """Against the ids of all ranks, by brute force."""
    config = config_with("data.lanes=8", "train.global_batch=32")
    fleet = fleet_of(config, index_of(23, 100), 4, 2)
    by_node, by_rank = Counter(), Counter()
    for rank in range(8):
        slots = fleet.slots(rank, rank + 1)
        for shard in {
            int(s) for b in range(fleet.order.batches_per_epoch) for s in fleet.order.refs(b, *slots).ids >> 32
        }:
            by_rank[shard] += 1
            by_node[shard, rank // 2] = 1
    nodes = Counter(shard for shard, _ in by_node)
    rows = {row[0]: row[1:] for row in _epoch(fleet)}
    for name, counted in (("nodes", nodes), ("ranks", by_rank)):
        values = list(counted.values())
        told = [float(value) for value in rows[f"{name} that open a shard"]]
        assert told == pytest.approx([min(values), np.mean(values), max(values)], rel=1e-3)


def test_ranks_that_share_lanes_are_counted_each() -> None:
    config = config_with("data.lanes=2")
    rows = {row[0]: row[1:] for row in _epoch(fleet_of(config, index_of(10, 100), 2, 4))}
    assert rows["ranks that open a shard"][0] == "4", "four ranks a lane"
    assert rows["nodes that open a shard"][0] == "1"


def test_the_text_says_what_is_wrong_with_a_plan() -> None:
    index = index_of(60, 100)
    told = simulate(config_with("data.cache_bytes=250000"), index, 4, 2, 30)
    assert "warning: data.lanes=4" in told
    assert "warning: data.cache_bytes=250000" in told
    assert "samples of all ranks in the first epoch none comes twice" in told
    assert "no URLs" not in told
    assert simulate(config_with("data.cache_bytes=250000"), index, 4, 2, 30) == told
    assert "warning" not in simulate(config_with("data.lanes=8"), index, 4, 2, 30)
    with pytest.raises(ConfigError, match=r"data\.cache_bytes=5000: a shard alone"):
        simulate(config_with("data.cache_bytes=5000"), index, 4, 2, 30)
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        simulate(config_with(), index, 5, 8, 30)


def test_the_verb_needs_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": f"s{shard}.tar", "samples": 50, "bytes": 5000} for shard in range(40)]
    (tmp_path / "index.json").write_text(json.dumps({"format": "vitscale-index-1", "shards": rows}))
    (tmp_path / "run.yaml").write_text("train: {global_batch: 64, micro_batch: 4, steps: 9}\n")
    command = [
        "simulate",
        str(tmp_path / "run.yaml"),
        f"data.index={tmp_path}/index.json",
        "--nodes",
        "2",
        "--gpus",
        "4",
    ]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "data: 2,000 samples in 40 shards, 200 kB" in told
    assert "the shards are no URLs" in told
    assert "a step: 64 images, on 2 x 4 ranks 2 micro-batch(es) of 4 each" in told
    assert main([*command, "train.micro_batch=auto", "parallel.zero_stage=auto"]) == 0
    assert "a step: 64 images, on 2 x 4 ranks as micro-batches that the run chooses" in capsys.readouterr().out
    assert main(["simulate", str(tmp_path / "run.yaml"), "--nodes", "2"]) == 2
    assert "data.train is empty" in capsys.readouterr().err


def test_a_mixture_by_an_index_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [*(f"s3://b/web/{shard}.tar" for shard in range(30)), *(f"s3://b/ours/{kind}/0.tar" for kind in "xy")]
    rows = [{"name": name, "samples": 50 + place, "bytes": 5000} for place, name in enumerate([*names, "s3://b/c.tar"])]
    (tmp_path / "index.json").write_text(json.dumps({"format": "vitscale-index-1", "shards": rows}))
    (tmp_path / "run.yaml").write_text("train: {global_batch: 64, micro_batch: 4, steps: 9}\n")
    index = ShardIndex.load(tmp_path / "index.json")
    mixed = (Source("s3://b/ours/**/*.tar", weight=1), Source("s3://b/web/{0..29}.tar", weight=3))
    chosen = index.by_sources(mixed)
    assert (chosen.sources, list(chosen.paths)) == ((2, 30), [*names[30:], *names[:30]])
    assert chosen.samples.tolist() == [80, 81, *range(50, 80)]
    shares = "{pattern: 's3://b/ours/*/*.tar', repeat: 4}"
    command = ["simulate", str(tmp_path / "run.yaml"), f"data.index={tmp_path}/index.json", "--nodes", "2"]
    assert main([*command, f"data.train=['s3://b/web/*.tar', {shares}]"]) == 0
    assert "in 32 shards" in capsys.readouterr().out
    assert main([*command, f"data.train=['s3://b/web/{{0..30}}.tar', {shares}]"]) == 2
    assert "data.index: has no row for s3://b/web/30.tar" in capsys.readouterr().err
    assert main([*command, f"data.train=['s3://b/**/*.tar', {shares}]"]) == 2
    assert "s3://b/ours/x/0.tar: is named twice by data.train" in capsys.readouterr().err
    assert main([*command, f"data.train=['s3://b/none/*.tar', {shares}]"]) == 2
    assert "data.train='s3://b/none/*.tar': no such file" in capsys.readouterr().err


def test_relative_and_odd_names_are_found_in_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"name": f"{name}.tar", "samples": 5, "bytes": 5000} for name in ("a/0", "a/1", "b[1]/0", "b[1]/1")]
    (tmp_path / "index.json").write_text(json.dumps({"format": "vitscale-index-1", "shards": rows}))
    (tmp_path / "b[1]").mkdir()  # as it would be where a run is
    index = ShardIndex.load("index.json").by_sources((Source("b[1]/*.tar"), Source(f"{tmp_path}/a/{{0,1}}.tar")))
    assert (index.sources, list(index.paths)) == ((2, 2), ["b[1]/0.tar", "b[1]/1.tar", "a/0.tar", "a/1.tar"])


def test_a_perfect_shuffle_is_as_far_as_it_should_be() -> None:
    counts = np.array([30] * 20 + [7] * 10)
    ids = np.repeat(np.arange(30), counts)
    rng = np.random.default_rng(0)
    drawn = np.mean([len(np.unique(rng.choice(ids, 40, replace=False))) for _ in range(3000)])
    assert _perfect_shards(counts, 40) == pytest.approx(drawn, rel=0.01)
    assert _perfect_shards(counts, 660) == pytest.approx(30), "the last batch that leaves fewer than a shard"
    assert _perfect_shards(np.array([5, 5]), 10) == 2


def test_mixing_grows_with_lanes_and_window() -> None:
    counts = np.full(64, 100)
    one, more, wide = (mixing(counts, 0, 32, lanes, window) for lanes, window in ((1, 64), (16, 64), (1, 3000)))
    assert one.shards < 3 < 14 < more.shards <= 32
    assert one.shards < wide.shards <= wide.perfect_shards * 1.05
    assert one.apart < 64 < wide.apart < one.perfect_apart
    whole = mixing(counts, 0, 32, 1, 6400)
    assert whole.shards == pytest.approx(whole.perfect_shards, rel=0.1), "a window of all samples is a perfect shuffle"
