from __future__ import annotations

import json

import pytest

from vitscale.bench.launches import ALL, LAUNCHER, RESUMED
from vitscale.bench.startup import MESH, ON_DEMAND, OPEN, STAT, main


@pytest.mark.full
def test_the_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "Ti", "--ranks", "1", "--shards", "300", "--rounds", "1", "--joins", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["shards"] == 300
    stat, opened = (result["contenders"][name] for name in (STAT, OPEN))
    launched = result["launches"][RESUMED]
    assert launched[ALL][0] == pytest.approx(sum(of_part[0] for part, of_part in launched.items() if part != ALL))
    assert {"imports", "engine", "first step", LAUNCHER} < set(launched)
    assert opened["ratio"] == stat["seconds"][0] / opened["seconds"][0]
    assert all(set(took) == {"joining", "first_exchange", "open_files"} for took in result["joins"]["2"].values())
    assert set(result["joins"]["2"]) == {MESH, ON_DEMAND}
    assert result["broadcast_bytes"] > 300 * 32, "a digest for each shard"


def test_a_count_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--rounds", "0"], ["--shards", "-1"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "must be a whole number above 0" in capsys.readouterr().err
