from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitscale.bench.launches import ALL, LAUNCHER, NEW, RESUMED, measure, table
from vitscale.bench.startup import MESH, ON_DEMAND, OPEN, STAT, main


def test_the_table_has_every_part_of_either_start() -> None:
    seconds = {NEW: {"index": [1.0, 3.0, 2.0], ALL: [9.0]}, RESUMED: {"index": [1.0], "choice": [0.5], ALL: [8.0]}}
    header, new, resumed = table(seconds)
    assert header[1:] == ["index", "choice", ALL]
    assert (new[1:], resumed[1:]) == (["2.0", "", "9.0"], ["1.0", "0.5", "8.0"])


@pytest.mark.full
def test_compiling_starts_cold_and_goes_on_with_what_was_kept(tmp_path: Path) -> None:
    measured = measure("Ti", 1, 1, tmp_path, compiled=True)
    assert measured.keys() == {NEW, RESUMED}
    assert (tmp_path / "run0" / "compile_cache-0.bin").stat().st_size > 0
    assert "compile: true" in (tmp_path / "run0" / "config.yaml").read_text()
    assert {"cache-run0-1", "cache-run0-2"} < {path.name for path in tmp_path.iterdir()}


@pytest.mark.full
def test_the_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "Ti", "--ranks", "1", "--shards", "300", "--rounds", "1", "--joins", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["shards"] == 300
    stat, opened = (result["contenders"][name] for name in (STAT, OPEN))
    launched = result["launches"][RESUMED]
    assert launched[ALL][0] == pytest.approx(sum(of_part[0] for part, of_part in launched.items() if part != ALL))
    assert {"imports", "index", "engine", "first step", LAUNCHER} < set(launched)
    assert opened["ratio"] == stat["seconds"][0] / opened["seconds"][0]
    assert all(set(took) == {"joining", "first_exchange", "open_files"} for took in result["joins"]["2"].values())
    assert set(result["joins"]["2"]) == {MESH, ON_DEMAND}
    assert result["broadcast_bytes"] > 300 * 32, "a digest for each shard"


def test_a_count_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--rounds", "0"], ["--shards", "-1"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "must be a whole number above 0" in capsys.readouterr().err
