"""`vitscale bench model` runs all contenders, takes the faster peer, and says what it left out."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from vitscale.bench import measuring, model
from vitscale.errors import ConfigError

RUN = "--preset Ti --batch 1 --rounds 2 --device cpu"


def measured(capsys: pytest.CaptureFixture[str], arguments: str) -> tuple[dict, str]:
    assert model.main(arguments.split()) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_the_ratio_is_that_to_the_faster_peer(capsys: pytest.CaptureFixture[str]) -> None:
    result, out = measured(capsys, RUN)
    assert "transformers" in result["forward"]["seconds"]
    assert result["left_out"] == {}
    for kind in ("forward", "forward + backward"):
        seconds = result[kind]["seconds"]
        assert {name: len(each) for name, each in seconds.items()} == {"vitscale": 2, "timm": 2, "transformers": 2}
        faster = min((seconds[name] for name in ("timm", "transformers")), key=statistics.median)
        expected = statistics.median(peer / own for peer, own in zip(faster, seconds["vitscale"], strict=True))
        assert result[kind]["ratio"]["vitscale"] == pytest.approx(expected)
        assert f"ratio {expected:.3f}" in out


def test_a_peer_that_cannot_be_imported_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model.TIMM_NAMES, "Ti", "no_such_vit")  # what timm then raises is a RuntimeError
    result, out = measured(capsys, RUN)
    assert "timm" not in result["forward"]["seconds"]
    assert "no_such_vit" in result["left_out"]["timm"]
    assert "timm is left out: RuntimeError" in out


def test_all_have_the_same_sizes() -> None:
    config = model.ViTConfig(**model.preset("Ti"), num_labels=model.CLASSES)
    counts = {
        name: sum(each.numel() for each in build().parameters())
        for name, build in model.classifiers("Ti", config).items()
    }
    assert set(counts.values()) == {5_717_416}, counts


def test_exported_models_are_timed_too(capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = measured(capsys, f"{RUN} --onnx")
    assert set(result["forward"]["seconds"]) >= {"vitscale", "ONNX", "ONNX, int8 dynamic", "ONNX, int8 static"}
    assert "ONNX" not in result["forward + backward"]["seconds"]


def test_imports_are_timed_in_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "IMPORTS", ("pass", "import vitscale", "import no_such_package"))
    taken = model._import_seconds(2)
    assert {line: len(each) for line, each in taken.items()} == {"pass": 2, "import vitscale": 2}


def test_contenders_take_turns_there_and_back() -> None:
    assert [measuring.in_turn("abc", number) for number in range(3)] == ["abc", "cba", "abc"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_missing_gpu_is_told() -> None:
    with pytest.raises(ConfigError, match="--device=cuda: torch sees no GPU"):
        model.main(["--device", "cuda"])
