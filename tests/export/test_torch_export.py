"""A .pt2 gives the model's answers wherever torch is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.export.small import noise, small
from vitscale.errors import ConfigError
from vitscale.export.served import Served, trace
from vitscale.export.torch_export import int8_weights, open_torch_export, write_torch_export


def run_elsewhere(path: Path, images: torch.Tensor, tmp_path: Path) -> torch.Tensor:
    """In a process that has torch and nothing of ours, nor torchao."""
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import sys
sys.modules["vitscale"] = sys.modules["torchao"] = None
import torch
graph = torch.export.load({str(path)!r}).module()
torch.save(graph(torch.load({str(tmp_path / "images.pt")!r}))[0].detach(), {str(tmp_path / "out.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "out.pt")


def test_same_answers(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "model.pt2"
    write_torch_export(trace(Served(model, dynamic_size=True)), path, {"config.json": {"a": 1}})
    run = open_torch_export(path)
    for n, size in [(1, (32, 32)), (4, (32, 32)), (2, (48, 16))]:
        images = noise(n, model, size)
        expected = model(images, interpolate_pos_encoding=True).logits.detach()
        torch.testing.assert_close(run(images)[0], expected, rtol=1e-5, atol=1e-5)
    assert not run(images)[0].requires_grad
    torch.testing.assert_close(run_elsewhere(path, images, tmp_path), expected, rtol=1e-5, atol=1e-5)
    told = {"config.json": ""}
    torch.export.load(path, extra_files=told)
    assert json.loads(told["config.json"]) == {"a": 1}


def test_int8_weights(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="no torchao here")
    model = small(hidden_size=64, intermediate_size=256)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    served = Served(model)
    smaller = int8_weights(served)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "a copy"
    matrices = [value for value in smaller.state_dict().values() if value.ndim == 2 and min(value.shape) > 4]
    assert {value.dtype for value in matrices} == {torch.int8}
    assert smaller.bytes < 0.45 * served.bytes
    path = tmp_path / "model.pt2"
    write_torch_export(trace(smaller), path, {})
    images = noise(4, model)
    with torch.no_grad():
        expected, own = model(images).logits, smaller(images)[0]
    found = run_elsewhere(path, images, tmp_path)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    assert 1e-5 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.quantization", "torchao.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"torchao for torch .*pip install --no-deps torchao") as caught:
        int8_weights(Served(small()))
    assert "\n" not in str(caught.value)
