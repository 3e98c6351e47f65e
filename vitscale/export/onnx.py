"""ONNX by torch's dynamo exporter; int8 in place of float32 by onnxruntime's quantizer; such a file run on the CPU.

Quantized are the matrix products with weights; those within attention, norms and softmax stay in float32.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor
from torch.export import ExportedProgram

from vitscale.export.agreement import Runner
from vitscale.export.served import INPUT, Served

OPSET = 20  # the first with Gelu; TensorRT 10 and onnxruntime 1.17 know it
ONE_FILE = 1 << 30  # bytes of weights; protobuf ends at 2 GiB, so more of them lie in FILE.data
# Weights have 7 bits: CPUs without VNNI add pairs of products in 16 bits, which 8 bits overflow.
SEVEN_BITS = True


def write_onnx(served: Served, program: ExportedProgram, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Translate the graph that `trace` made of `served`.

    The weights lie in the file, or beside it in FILE.data where they are too large for one. about: names and content,
    kept as JSON in the file's metadata: what whoever serves it needs beside the graph.
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
    translated.model.producer_name, translated.model.doc_string = "vitscale", ""
    translated.model.metadata_props.clear()
    translated.model.metadata_props.update({name: json.dumps(content) for name, content in (about or {}).items()})
    translated.save(path, external_data=served.bytes > ONE_FILE)


def quantize_onnx(source: Path, target: Path, calibration: Iterable[Tensor] | None, large: bool = False) -> None:
    """Make an int8 file of a float32 one, each weight with a scale a channel.

    calibration: batches of pixels [n, channels, height, width] whose ranges fix the activations' scales (static,
    QuantizeLinear and DequantizeLinear around int8, symmetric as TensorRT wants it); None: every run finds its own
    (dynamic, MatMulInteger). large: weights beside the file, as `source` has them.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        prepared = Path(scratch, "prepared.onnx")
        quant_pre_process(
            source, prepared, skip_symbolic_shape=True, save_as_external_data=large, all_tensors_to_one_file=large
        )
        if calibration is None:
            quantize_dynamic(
                prepared,
                target,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=SEVEN_BITS,
                weight_type=QuantType.QInt8,
                use_external_data_format=large,
                extra_options={"MatMulConstBOnly": True},
            )
            return
        quantize_static(
            prepared,
            target,
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            nodes_to_exclude=_products_of_activations(prepared),
            per_channel=True,
            reduce_range=SEVEN_BITS,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=large,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )


def _products_of_activations(path: Path) -> list[str]:
    """The matrix products of attention, whose second factor is no weight."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {weight.name for weight in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights]


def open_onnx(path: Path) -> Runner:
    """The file as a function of pixels [n, channels, height, width], with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in session.run(None, {INPUT: pixel_values.numpy()}))

    return run


class _Reader(CalibrationDataReader):
    """Batches as onnxruntime's calibration asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}
