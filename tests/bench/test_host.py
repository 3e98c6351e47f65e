from __future__ import annotations

import json

import pytest

from vitscale.bench.host import PARTS, main


def test_the_bench_runs(capfd: pytest.CaptureFixture[str], single_rank: None) -> None:
    assert main(["--steps", "2", "--rounds", "1"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert list(result["contenders"]) == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    for figure in result["contenders"].values():
        assert all(figure[f"{part}_ms"] > 0 for part in PARTS)
        assert figure["median_ms"] == pytest.approx(figure["update_ms"] + figure["loop_ms"])
