"""ONNX by torch's dynamo exporter, and such a file run by onnxruntime on the CPU."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.export import ExportedProgram

from vitscale.export.agreement import Runner
from vitscale.export.served import INPUT, Served

OPSET = 20  # the first with Gelu; TensorRT 10 and onnxruntime 1.17 know it
ONE_FILE = 1 << 30  # bytes of weights; protobuf ends at 2 GiB, so more of them lie in FILE.data


def write_onnx(served: Served, program: ExportedProgram, path: Path) -> None:
    """Translate the graph that `trace` made of `served`.

    The weights lie in the file, or beside it in FILE.data where they are too large for one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's, of its own insides
        translated = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=list(served.output_names),
            dynamic_shapes=served.dynamic_shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert translated is not None, "torch.onnx.export(dynamo=True) gives a program"
    for node in translated.model.graph.all_nodes():  # torch's notes, a third of a small file
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    translated.save(path, external_data=served.bytes > ONE_FILE)


def describe(path: Path, about: Mapping[str, Any]) -> None:
    """Put JSON texts into the file's metadata: what whoever serves it needs beside the graph."""
    proto = onnx.load(path, load_external_data=False)
    proto.producer_name, proto.doc_string = "vitscale", ""
    onnx.helper.set_model_props(proto, {name: json.dumps(content) for name, content in about.items()})
    path.write_bytes(proto.SerializeToString())


def open_onnx(path: Path) -> Runner:
    """The file as a function of pixels [n, channels, height, width], with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in session.run(None, {INPUT: pixel_values.numpy()}))

    return run
