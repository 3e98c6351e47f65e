"""ONNX files with int8 in place of float32, by onnxruntime's quantizer.

Quantized are the matrix products with weights; those within attention, norms and softmax stay in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
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

from vitscale.export.served import INPUT

# Weights have 7 bits: CPUs without VNNI add pairs of products in 16 bits, which 8 bits overflow.
SEVEN_BITS = True


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


class _Reader(CalibrationDataReader):
    """Batches as onnxruntime's calibration asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}
