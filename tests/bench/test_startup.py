from __future__ import annotations

import json

import pytest

from vitscale.bench.startup import main


def test_the_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shards", "300", "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["shards"] == 300
    assert result["ratio"] == result["open_seconds"] / result["stat_seconds"] > 1
    assert result["broadcast_bytes"] > 300
