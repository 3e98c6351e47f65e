from __future__ import annotations

import json

import pytest

from vitscale.bench.zero import DDP, main
from vitscale.engine import zero, zero_host


def test_the_bench_runs(capfd: pytest.CaptureFixture[str], single_rank: None) -> None:
    assert main(["--steps", "1", "--rounds", "1"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    stages = [f"ZeRO-{stage}{how}" for stage in (1, 2, 3) for how in ("", ", DeepSpeed by itself")]
    assert list(result["contenders"]) == [DDP, *stages]
    assert all(figure["median_ms"] > 0 for figure in result["contenders"].values())
    assert zero.spare_the_host is zero_host.spare_the_host
