from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from vitscale.bench.loader import main, photograph


def test_the_images_are_what_is_said() -> None:
    data = photograph(0)
    assert 45_000 < len(data) < 65_000
    assert Image.open(io.BytesIO(data)).size == (500, 375)
    assert photograph(1) != data


@pytest.mark.full
def test_the_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "80", "--seconds", "0.2", "--rounds", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in out if line.startswith("{")]
    assert len(lines) >= 3
    assert lines[-1]["ratio_to_webdataset_pillow"] == 1.0
    assert all(line["images_per_second"] > 0 and line["cpu_ms_per_image"] > 0 for line in lines)
