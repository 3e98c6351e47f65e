from __future__ import annotations

import json

import pytest

from vitscale.bench.exchange import BESIDE, GATHERED, WAITED, main


def test_the_bench_runs(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "1", "2", "--steps", "2", "--step-ms", "1", "--rounds", "1"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    names = {f"{ranks} ranks: {name}" for ranks in (1, 2) for name in (GATHERED, WAITED, BESIDE)}
    assert result["contenders"].keys() == names
    for name, figure in result["contenders"].items():
        assert figure["microseconds"] == figure["seconds"][0] * 1e6 > 0, name
