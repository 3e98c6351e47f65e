from __future__ import annotations

import json

import pytest

from vitscale.bench.guards import STEP, main


@pytest.mark.usefixtures("single_rank")
def test_the_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "Ti", "--batch", "1", "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    others = [each["seconds"][0] for name, each in result["contenders"].items() if name != STEP]
    assert len(others) == 4
    assert all(seconds > 0 for seconds in others)
    assert result["share"] == pytest.approx(sum(others) / result["contenders"][STEP]["seconds"][0])
