"""int8 files: what is quantized and how, and that their answers stay near."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array

from tests.export.small import noise, small
from vitscale.export import onnx as exporter
from vitscale.export.agreement import difference
from vitscale.export.onnx import open_onnx, quantize_onnx, write_onnx
from vitscale.export.served import Served, trace

LAYERS = 2


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Served, Path]:
    """A float32 file for any size, of matrices large enough that their bytes count."""
    served = Served(small(hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS), dynamic_size=True)
    path = tmp_path_factory.mktemp("exact") / "float32.onnx"
    write_onnx(served, trace(served), path)
    return served, path


def int8_weights(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    stored = {weight.name: to_array(weight) for weight in graph.initializer}
    return {name: value for name, value in stored.items() if value.dtype == np.int8 and value.ndim > 1}


def near(served: Served, path: Path, of: float) -> None:
    """Answers within a share of their own range, and not the same ones."""
    images = noise(6, served.model)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = served(images)
    found = open_onnx(path)(images)
    assert 1e-5 < difference(found, expected) < of * float(expected[0].max() - expected[0].min())
    assert open_onnx(path)(images[:1, :, :16, :24])[0].shape == (1, 5), "another number and size"


def test_dynamic(exact: tuple[Served, Path], tmp_path: Path) -> None:
    served, path = exact
    target = tmp_path / "dynamic.onnx"
    quantize_onnx(path, target, None)
    kinds = Counter(node.op_type for node in onnx.load(target).graph.node)
    assert kinds["MatMulInteger"] == 4 * LAYERS + 1, "qkv, output, two of the MLP; the classifier"
    assert kinds["MatMul"] == 2 * LAYERS, "those within attention"
    weights = int8_weights(target)
    assert len(weights) == 4 * LAYERS + 1
    assert max(abs(int(value.min())) for value in weights.values()) <= 64, "7 bits: 16-bit sums must not overflow"
    scales = {to_array(w).size for w in onnx.load(target).graph.initializer if w.name.endswith("_scale")}
    assert {64, 128, 192} <= scales, "one scale a channel"
    assert target.stat().st_size < 0.5 * path.stat().st_size
    near(served, target, 0.1)
    assert sorted(tmp_path.iterdir()) == [target]


def test_static(exact: tuple[Served, Path], tmp_path: Path) -> None:
    served, path = exact
    target = tmp_path / "static.onnx"
    seen = []

    def calibration() -> object:
        for n in range(2, 7):
            seen.append(n)
            yield noise(n, served.model)  # type: ignore[arg-type]

    quantize_onnx(path, target, calibration())  # type: ignore[arg-type]
    assert seen == [2, 3, 4, 5, 6], "every batch was looked at"
    graph = onnx.load(target).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["QuantizeLinear"] > 0
    assert kinds["DequantizeLinear"] > kinds["QuantizeLinear"]
    assert not {"MatMulInteger", "QLinearMatMul", "DynamicQuantizeLinear"} & kinds.keys()
    made_by = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    inside = [node for node in products if "DequantizeLinear" not in {
        made_by[name].op_type for name in node.input if name in made_by}]  # fmt: skip
    assert len(inside) == 2 * LAYERS, "the products within attention stay in float32"
    stored = {weight.name: to_array(weight) for weight in graph.initializer}
    zero_points = [stored[n.input[2]] for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert not any(value.any() for value in zero_points), "symmetric"
    assert {value.dtype for value in zero_points} <= {np.dtype(np.int8), np.dtype(np.int32)}
    assert len(int8_weights(target)) == 4 * LAYERS + 2, "the patches' projection too"
    near(served, target, 0.15)


def test_large_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files whose weights lie beside them."""
    monkeypatch.setattr(exporter, "ONE_FILE", 1000)
    served = Served(small())
    path, target = tmp_path / "float32.onnx", tmp_path / "int8.onnx"
    write_onnx(served, trace(served), path)
    quantize_onnx(path, target, None, large=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "float32.onnx", "float32.onnx.data", "int8.onnx", "int8.onnx.data"]  # fmt: skip
    images = noise(3, served.model)  # type: ignore[arg-type]
    with torch.no_grad():
        assert difference(open_onnx(target)(images), served(images)) < 0.3
