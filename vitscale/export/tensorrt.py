"""Whether TensorRT takes an ONNX file, and the command that builds its engine from it."""

from __future__ import annotations

import shlex
from pathlib import Path

import onnx

from vitscale.config.model_rules import pair
from vitscale.export.served import INPUT, LEAST_PATCHES, Served

OPSETS = range(9, 21)  # of TensorRT 10.0; later ones take later opsets too
# What its parser knows by name and refuses (onnx-tensorrt, docs/operators.md of release 10.1).
UNSUPPORTED = frozenset(
    """
    AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Col2Im CenterCropPad
    Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear HammingWindow HannWindow ImageDecoder
    MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional
    OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch STFT SequenceAt SequenceConstruct
    SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence
    StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique
    """.split()  # noqa: SIM905 - a table, not a column of 50 lines
)
SMALLEST, USUAL, LARGEST = 1, 8, 32  # images a batch that the engine is built for


def objections(path: Path) -> list[str]:
    """Why TensorRT would not take the file; empty where it passes."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        return [f"onnx.checker: {str(error).splitlines()[0]}"]
    proto = onnx.load(path, load_external_data=False)
    found = []
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            found.append(f"opset {opset.version}, it takes {OPSETS[0]} to {OPSETS[-1]}")
    foreign = {f"{node.domain}:{node.op_type}" for node in proto.graph.node if node.domain not in ("", "ai.onnx")}
    unsupported = foreign | {node.op_type for node in proto.graph.node if node.op_type in UNSUPPORTED}
    if unsupported:
        found.append(f"operators {', '.join(sorted(unsupported))}")
    return found + _zero_points(proto)


def _zero_points(proto: onnx.ModelProto) -> list[str]:
    """It quantizes symmetrically only: every zero point must be zero."""
    quantizers = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    names = {node.input[2] for node in quantizers if len(node.input) > 2}
    stored = [weight for weight in proto.graph.initializer if weight.name in names]
    if any(onnx.numpy_helper.to_array(weight).any() for weight in stored):
        return ["zero points that are not zero"]
    return []


def engine_command(path: Path, served: Served) -> str:
    """The line that builds FILE.engine for 1 to 32 images, with dynamic size for half to twice the model's sides."""
    sides = list(zip(pair(served.config.image_size), pair(served.config.patch_size), strict=True))
    least = LEAST_PATCHES if served.dynamic_size else 1
    factors = {"min": (SMALLEST, 0.5), "opt": (USUAL, 1.0), "max": (LARGEST, 2.0)}
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.engine')}"]
    for name, (images, factor) in factors.items():
        scale = factor if served.dynamic_size else 1.0
        size = [max(least, int(side * scale) // patch) * patch for side, patch in sides]
        shape = "x".join(map(str, [images, served.config.num_channels, *size]))
        words.append(f"--{name}Shapes={INPUT}:{shape}")
    # Precisions as the file has them: float32, and int8 where it is quantized.
    return shlex.join([*words, "--stronglyTyped"])
