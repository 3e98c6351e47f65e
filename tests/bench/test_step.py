"""`vitscale bench step` runs both models and says what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from vitscale.bench import step
from vitscale.errors import ConfigError


def test_measures_both_and_ends_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--preset Ti --batch 1 --rounds 2 --device cpu --peak 0.5"
    assert step.main(arguments.split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["peak_tflops"] == 0.5
    for name in ("vitscale", "transformers"):
        measured = result[name]
        assert len(measured["step_seconds"]) == 2
        assert measured["utilization"] == pytest.approx(
            measured["images_per_second"] * result["gflop_per_image"] / 500, rel=1e-6
        )
        assert 30 < measured["peak_memory_mib"] < 3000  # 8M parameters, their gradients, twice that by Adam
        assert 0.3 < measured["loss"] < 3  # of patches standardized
    rates = [result[name]["images_per_second"] for name in ("vitscale", "transformers")]
    assert result["ratio"] == pytest.approx(rates[0] / rates[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_missing_gpu_is_told() -> None:
    with pytest.raises(ConfigError, match="--device=cuda: torch sees no GPU"):
        step.main(["--device", "cuda"])
