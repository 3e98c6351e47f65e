"""What TensorRT takes, and the command that builds its engine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.export.small import noise, small
from vitscale.export.onnx import write_onnx
from vitscale.export.quantize import quantize_onnx
from vitscale.export.served import Served, trace
from vitscale.export.tensorrt import engine_command, objections


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Served, Path]:
    served = Served(small(), dynamic_size=True)
    path = tmp_path_factory.mktemp("exact") / "model.onnx"
    write_onnx(served, trace(served), path)
    return served, path


def test_a_float_file_and_a_static_one_pass(exact: tuple[Served, Path], tmp_path: Path) -> None:
    path = exact[1]
    assert objections(path) == []
    quantize_onnx(path, tmp_path / "static.onnx", [noise(4, small())])
    assert objections(tmp_path / "static.onnx") == []


def test_a_dynamic_file_does_not(exact: tuple[Served, Path], tmp_path: Path) -> None:
    quantize_onnx(exact[1], tmp_path / "dynamic.onnx", None)
    assert objections(tmp_path / "dynamic.onnx") == ["operators DynamicQuantizeLinear, MatMulInteger"]


def one_node(kind: str, opset: int = 20, domain: str = "", zero: int | None = None) -> onnx.ModelProto:
    """A file of a single operator."""
    stored = [] if zero is None else [
        numpy_helper.from_array(np.float32(0.5), "scale"), numpy_helper.from_array(np.int8(zero), "zero")]  # fmt: skip
    node = helper.make_node(kind, ["x", *(weight.name for weight in stored)], ["y"], domain=domain)
    output = TensorProto.INT8 if zero is not None else TensorProto.FLOAT
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", output, [2])],
        stored,
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (one_node("Relu"), None),
        (one_node("Relu", opset=21), "opset 21, it takes 9 to 20"),
        (one_node("FusedMatMul", domain="com.microsoft"), "operators com.microsoft:FusedMatMul"),
        (one_node("QuantizeLinear", zero=0), None),
        (one_node("QuantizeLinear", zero=3), "zero points that are not zero"),
        (one_node("NoSuchOperator"), "onnx.checker: No Op registered for NoSuchOperator"),
    ],
)
def test_objections(tmp_path: Path, model: onnx.ModelProto, says: str | None) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    found = objections(path)
    assert len(found) == (says is not None)
    assert all(str(says) in each for each in found)


def test_the_command(tmp_path: Path) -> None:
    model = small(image_size=(24, 32), patch_size=8, num_channels=4)
    assert engine_command(Path("a b.onnx"), Served(model)).split("--")[1:] == [
        "onnx=a b.onnx' '", "saveEngine=a b.engine' ", "minShapes=pixel_values:1x4x24x32 ",
        "optShapes=pixel_values:8x4x24x32 ", "maxShapes=pixel_values:32x4x24x32 ", "stronglyTyped",
    ]  # fmt: skip
    varying = engine_command(Path("m.onnx"), Served(model, dynamic_size=True))
    for shape in ("min", "1x4x16x16"), ("opt", "8x4x24x32"), ("max", "32x4x48x64"):
        assert f"--{shape[0]}Shapes=pixel_values:{shape[1]}" in varying
    assert "minShapes=pixel_values:1x3x8x8 " in engine_command(Path("m.onnx"), Served(small(image_size=8)))


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("trtexec") is None, reason="no trtexec (TensorRT) here")
def test_the_engine_is_built(exact: tuple[Served, Path]) -> None:
    served, path = exact
    done = subprocess.run(engine_command(path, served), shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert path.with_suffix(".engine").stat().st_size > 0
