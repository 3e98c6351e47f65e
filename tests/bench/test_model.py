"""`vitscale bench model` measures inference of all, exported models too."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from vitscale.bench import model
from vitscale.errors import ConfigError

RUN = "--preset Ti --batch 1 --rounds 2 --device cpu --peak 0.5"


def measured(capsys: pytest.CaptureFixture[str], arguments: str) -> tuple[dict, str]:
    assert model.main(arguments.split()) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


@pytest.mark.full
def test_exported_models_are_measured_beside_the_peers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that cannot be imported is left out, with the reason."""
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    result, out = measured(capsys, f"{RUN} --onnx")
    exported = {"ONNX", "ONNX, int8 dynamic", "ONNX, int8 static"}
    assert set(result["contenders"]) == {"vitscale eager", "transformers eager"} | exported
    assert result["fastest_peer"] == "transformers eager"
    assert "timm eager is left out: ModuleNotFoundError" in out
    for figure in result["contenders"].values():
        assert len(figure["seconds"]) == 2
        assert figure["utilization"] == pytest.approx(figure["images_per_second"] * result["gflop_per_image"] / 500)
    assert 2.4 < result["gflop_per_image"] < 2.6  # a third of what training takes; DeiT-Ti: 1.25 GMACs


def test_a_size_that_no_preset_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"XXL.*must be one of"):
        model.main(["--preset", "XXL", "--device", "cpu"])


@pytest.mark.parametrize(("options", "words"), [
    ("--device cuda", "--device=cuda: torch sees no GPU"),
    ("--device cuda --onnx", "--onnx: is measured on the CPU"),
])  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_wrong_device_is_refused(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model.main(options.split())
