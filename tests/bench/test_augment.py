"""`vitscale bench augment` runs every contender, and leaves out with the reason what cannot be had."""

from __future__ import annotations

import json
import sys

import pytest

from vitscale.bench.augment import OURS, main


@pytest.mark.parametrize("preset", ["mae", "deit3", "randaug"])
def test_all_are_measured(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", preset, "--batch", "4", "--size", "32", "--rounds", "1", "--device", "cpu"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert list(result["contenders"]) == [
        OURS, "torchvision v2, an image at a time", "torchvision v2, a batch at a time"]  # fmt: skip
    assert result["left_out"] == {}
    assert result["contenders"][result["fastest_peer"]]["ratio"] == 1
    for name, figure in result["contenders"].items():
        assert figure["images_per_second"] == pytest.approx(4 / figure["seconds"][0])
        assert any(line.startswith(name) for line in table)


def test_without_torchvision_ours_is_measured_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    assert main(["--batch", "2", "--size", "16", "--rounds", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert list(result["contenders"]) == [OURS]
    assert "torchvision v2, a batch at a time is left out: ModuleNotFoundError" in out
