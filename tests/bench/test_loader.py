"""`vitscale bench loader` runs every contender on the images that it makes."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from vitscale.bench.loader import PEER, main
from vitscale.bench.photographs import photograph


def test_the_images_are_as_large_as_photographs() -> None:
    data = photograph(0)
    assert 45_000 < len(data) < 65_000
    assert Image.open(io.BytesIO(data)).size == (500, 375)
    assert photograph(1) != data


@pytest.mark.full
def test_the_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "80", "--seconds", "0.2", "--rounds", "1"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    contenders = result["contenders"]
    assert len(contenders) >= 3
    assert list(contenders)[-1] == PEER
    assert contenders[PEER]["ratio"] == 1
    for name, figure in contenders.items():
        assert figure["images_per_second"] == pytest.approx(1 / figure["seconds"][0])
        assert figure["cpu_ms_per_image"] > 0
        assert any(line.startswith(name) for line in table)
