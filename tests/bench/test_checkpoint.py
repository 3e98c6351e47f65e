from __future__ import annotations

import json
import math

import pytest

from vitscale.bench.checkpoint import BEHIND, OPEN, PUBLISH, WAITED, main, shapes_of, zero3_tables
from vitscale.bench.checkpoint_peers import DCP, DCP_LOAD, DEEPSPEED, DEEPSPEED_LOAD, LOAD, SAVE
from vitscale.checkpoint.fragments import join_tables


@pytest.mark.full
def test_the_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", "Ti", "--preset", "Ti", "--large", "Ti", "--ranks", "3", "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    engine, save, manifest = (result["sections"][name] for name in ("engine", "memory", "manifest Ti"))
    assert {DEEPSPEED, DEEPSPEED_LOAD, DCP, DCP_LOAD, SAVE, LOAD} < set(engine["contenders"])
    assert (
        engine["contenders"][DEEPSPEED]["bytes"]
        > engine["contenders"][SAVE]["bytes"]
        > 12 * sum(math.prod(shape) for shape in shapes_of("Ti").values())
    )
    assert 0 <= save["from_disk"] < 4
    assert {BEHIND, WAITED} < set(save["contenders"])
    assert set(manifest["contenders"]) == {PUBLISH, OPEN}
    assert manifest["pieces"] == 3 * 3 * len(shapes_of("Ti"))


@pytest.mark.full
def test_the_manifest_of_512_ranks_stays_small() -> None:
    """Some 900,000 pieces, of which a tensor needs two rows."""
    shapes = shapes_of("g")
    tables = zero3_tables(shapes, 512)
    records = join_tables(tables)
    assert {record.name: record.shape for record in records} == shapes
    pieces = sum(len(table.counts) for table in tables)
    assert pieces > 800_000
    assert sum(each.files for record in records for each in record.stretches) == pieces
    assert max(len(record.stretches) for record in records) == 2
    for record in records[::97]:
        parts = [last - first for _, first, last in record.covering(0, record.size)]
        assert sum(parts) == record.size
