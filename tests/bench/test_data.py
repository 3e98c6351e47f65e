"""`vitscale bench data` runs every contender on the shards that it makes."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vitscale.bench.all import run
from vitscale.bench.data import BARE, WEBDATASET_TAR, _size
from vitscale.bench.data_peers import WEBDATASET
from vitscale.bench.laps import Batches, run_laps
from vitscale.bench.photographs import photograph
from vitscale.bench.storage import DISK

SHORT = ("--images", "64", "--batch", "8", "--size", "64x48", "--seconds", "0.05", "--rounds", "1")


def test_the_images_are_as_large_as_photographs() -> None:
    data = photograph(0)
    assert 45_000 < len(data) < 65_000
    assert Image.open(io.BytesIO(data)).size == (500, 375)
    assert photograph(1) != data
    assert Image.open(io.BytesIO(photograph(0, (100, 200)))).size == (200, 100)


def test_a_size_is_width_and_height() -> None:
    assert _size("500x375") == (375, 500)
    for wrong in ("500", "0x4", "5x", "axb"):
        with pytest.raises(argparse.ArgumentTypeError, match="WIDTHxHEIGHT"):
            _size(wrong)


def test_samples_are_read_beside_webdataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every section is in the file."""
    out = tmp_path / "figures.json"
    assert run("data", [*SHORT, "--sections", "tar", "shards", "--json", str(out)]) == 0
    output = capfd.readouterr().out
    result = json.loads(out.read_text())
    assert result["bench"] == "data"
    found = result["sections"]
    assert list(found) == ["tar", "shards"]
    contenders = found["tar"]["contenders"]
    assert len(contenders) == 3
    assert contenders[WEBDATASET_TAR]["ratio"] == 1
    assert found["shards"]["shards_entered"] == 7
    assert found["shards"]["ms_within"] > 0
    assert all(any(line.startswith(name) for line in output.splitlines()) for name in contenders)


def test_what_cannot_run_is_left_out_with_the_reason() -> None:
    def runs() -> Batches:
        while True:
            yield 2

    def is_not_installed() -> Batches:
        import not_installed.at_all  # type: ignore[import-not-found]

        yield not_installed

    def fails() -> Batches:
        yield 1
        raise ValueError("no such codec")

    def ends() -> Batches:
        sys.exit(3)
        yield 1

    starts = {"good": runs, "missing": is_not_installed, "bad": fails, "gone": ends}
    laps, left_out = run_laps(starts, 0.01, 3, {"not_installed": "its-name"})
    assert {name: len(own) for name, own in laps.items()} == {"good": 3}
    assert laps["good"][0].seconds > 0
    assert left_out["missing"] == "not installed: pip install its-name"
    assert left_out["bad"] == "RuntimeError: ValueError: no such codec"
    assert "exit code 3" in left_out["gone"]


@pytest.mark.full
def test_every_contender_runs() -> None:
    command = [sys.executable, "-m", "vitscale.cli", "bench", "data", *SHORT, "--sections", "images", "storage"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    found = result["sections"]
    images = found["images"]
    assert {BARE, WEBDATASET} <= set(images["contenders"])
    assert len(images["contenders"]) + len(images["left_out"]) == 10
    assert images["contenders"][WEBDATASET]["ratio"] == images["contenders"][BARE]["share"] == 1
    for figure in images["contenders"].values():
        assert figure["per_second"] == pytest.approx(1 / figure["seconds"][0])
        assert figure["cpu_ms"] > 0
    storage = found["storage"]
    assert result["left_out"] == images["left_out"] | storage["left_out"]
    assert storage["contenders"][DISK]["ratio"] == 1
    assert len(storage["contenders"]) == 1 + 3 * (2 - len(storage["left_out"]))
