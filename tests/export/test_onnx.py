"""ONNX files give the model's answers in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from tests.export.small import OPTIONS, noise, small
from vitscale.export import onnx as exporter
from vitscale.export.onnx import open_onnx, write_onnx
from vitscale.export.served import Served, trace
from vitscale.models.vit import ViTModel

REPOSITORY = str(Path(__file__).resolve().parents[2])


def write(served: Served, path: Path, about: dict[str, Any] | None = None) -> Path:
    write_onnx(served, trace(served), path, about)
    return path


@pytest.mark.parametrize("name", OPTIONS)
def test_same_answers_for_any_number_and_size(tmp_path: Path, name: str) -> None:
    model = small(**OPTIONS[name], num_hidden_layers=1)
    path = write(Served(model, dynamic_size=True), tmp_path / "model.onnx")
    run = open_onnx(path)
    size = tuple(Served(model).random_images(1).shape[2:])
    for n, shape in [(1, size), (3, size), (2, (16, 16)), (2, (size[0] + 16, size[1] - 8)), (1, (16, 64))]:
        images = noise(n, model, shape)
        with torch.no_grad():
            expected = model(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(run(images)[0], expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.01, "answers that differ"


def test_a_fixed_size_two_outputs_and_what_the_file_tells(tmp_path: Path) -> None:
    model = small(ViTModel)
    about: dict[str, Any] = {"config.json": {"id2label": {"0": "cat", "1": "dög"}}, "preprocessor_config.json": {}}
    path = write(Served(model), tmp_path / "model.onnx", about)
    images = noise(3, model)
    with torch.no_grad():
        expected = model(images)
    for output, name in zip(open_onnx(path)(images), ("last_hidden_state", "pooler_output"), strict=True):
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-4)
    proto = onnx.load(path)
    shape = proto.graph.input[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", 3, 32, 32]
    assert [output.name for output in proto.graph.output] == ["last_hidden_state", "pooler_output"]
    assert proto.opset_import[0].version == exporter.OPSET
    assert not any(node.metadata_props for node in proto.graph.node), "torch's notes"
    assert REPOSITORY.encode() not in path.read_bytes(), "the file says where it was made"
    told = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_modelmeta()
    assert {name: json.loads(text) for name, text in told.custom_metadata_map.items()} == about
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        open_onnx(path)(noise(2, model, (40, 32)))


def test_as_many_threads_as_torch_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    text = "g (float[1] pixel_values) => (float[1] y) { y = Identity (pixel_values) }"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}'), path)
    real, threads = onnxruntime.InferenceSession, []

    def session(path: Path, options: onnxruntime.SessionOptions, **others: Any) -> onnxruntime.InferenceSession:
        threads.append(options.intra_op_num_threads)
        return real(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    for number in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        open_onnx(path)
    assert threads == [1, 3]


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "ONE_FILE", 1000)
    model = small()
    path = write(Served(model), tmp_path / "model.onnx")
    beside = tmp_path / "model.onnx.data"
    assert beside.stat().st_size > Served(model).bytes / 2 > path.stat().st_size / 2
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for each in (path, beside):
        each.rename(moved / each.name)
    images = noise(2, model)
    torch.testing.assert_close(open_onnx(moved / path.name)(images)[0], model(images).logits, rtol=1e-4, atol=1e-4)
