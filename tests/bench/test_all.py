"""`vitscale bench all`, and a benchmark's JSON as a file."""

from __future__ import annotations

import json
import platform
import re
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from vitscale.bench import all as benches
from vitscale.bench.all import run
from vitscale.cli import main
from vitscale.run_folder import BAD_INPUT

QUICK = ["--ranks", "2", "--rounds", "1", "--steps", "2"]


def test_the_json_is_a_file_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    assert run("exchange", [*QUICK, "--json", str(out)]) == 0
    printed = capfd.readouterr().out.splitlines()
    assert json.loads(out.read_text()) == json.loads(printed[-1])
    assert len(printed) > 1
    result = json.loads(out.read_text())
    assert result["command"] == "vitscale bench exchange " + " ".join(QUICK)
    assert result["versions"]["torch"] == metadata.version("torch")
    assert re.fullmatch(r"\d+ cores of .+", result["machine"])
    assert result["python"] == platform.python_version()
    assert datetime.now(UTC) - datetime.fromisoformat(result["date"]) < timedelta(minutes=10)
    assert main(["bench", "exchange", *QUICK, "--json", str(tmp_path / "nowhere" / "x.json")]) == BAD_INPUT


def test_all_of_them_and_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    brief = {"exchange": QUICK, "startup": ["--shards", "0"]}
    monkeypatch.setattr(benches, "BRIEF", brief)
    out = tmp_path / "figures.json"
    assert run("all", ["--json", str(out)]) == 1
    printed = capfd.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert json.loads(out.read_text()) == result
    assert result["results"]["exchange"]["command"] == "vitscale bench exchange " + " ".join(QUICK)
    assert result["results"]["exchange"]["steps"] == 2
    assert "must be a whole number above 0" in result["failed"]["startup"]
    assert result["seconds"].keys() == brief.keys()
    assert "launch/gpu_suite.sh" in printed[-2]


def test_one_that_hangs_is_stopped_with_all_its_processes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    endless = "987654321"  # steps
    monkeypatch.setattr(benches, "BRIEF", {"exchange": [*QUICK[:-1], endless]})
    assert run("all", ["--limit", "5"]) == 1
    printed = capfd.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert "not measured: took longer than 5 s" in printed
    assert result["failed"] == {"exchange": "took longer than 5 s"}
    assert "exchange: took longer than 5 s" in printed[-2]
    assert not [process for process in psutil.process_iter(["cmdline"]) if endless in (process.info["cmdline"] or ())]


def test_every_benchmark_is_in_it() -> None:
    """But for those that are of another one, and what they share."""
    shared = {
        "__init__",
        "all",
        "checkpoint_peers",
        "data_peers",
        "joins",
        "laps",
        "launches",
        "measuring",
        "peers",
        "photographs",
        "rounds",
        "storage",
    }
    files = {path.stem for path in Path(benches.__file__).parent.glob("*.py")}
    assert files - shared == {name.split()[0] for name in benches.BRIEF}
