"""`vitscale bench model`: inference of this project's classifier beside transformers' and timm's.

A step is a forward without gradients; `vitscale bench step` measures training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vitscale.bench.peers import Comparison, Step, logits, models_parser, report_models, run_config
from vitscale.errors import ConfigError
from vitscale.models.auto import new_model
from vitscale.models.vit import ViTPreTrainedModel


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = models_parser("model", __doc__)
    parser.add_argument("--onnx", action="store_true", help="also the exported model in onnxruntime, fp32 and int8")
    options = parser.parse_args(arguments)
    if options.onnx and options.device == "cuda":
        raise ConfigError("--onnx: is measured on the CPU; leave --device=cuda away")
    if options.onnx:
        options.device = "cpu"
    run = run_config(options.preset, "classification")
    comparison = Comparison(options, run, trains=False)
    starts = comparison.starts(partial(inference_step, comparison))
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as folder:
        if options.onnx:
            starts |= _exported(new_model(run, seed=0), comparison.images, Path(folder))
        result = {"bench": "model", **comparison.measure(starts)}
    report_models("Inference", result)
    return 0


def inference_step(comparison: Comparison, model: nn.Module) -> Step:
    """A forward that returns the scores."""
    model.eval()

    @torch.inference_mode()
    def step() -> Tensor:
        with comparison.autocast:
            return logits(model, comparison.images)

    return step


def _exported(model: ViTPreTrainedModel, images: Tensor, folder: Path) -> dict[str, Callable[[], Step]]:
    """The model in onnxruntime: as it is, and in int8 both ways (the ranges from `images` for static)."""
    from vitscale.export.onnx import open_onnx, quantize_onnx, write_onnx
    from vitscale.export.served import Served, trace

    served = Served(model.eval())
    plain, dynamic, static = (folder / f"{name}.onnx" for name in ("plain", "dynamic", "static"))
    write_onnx(served, trace(served), plain)
    quantize_onnx(plain, dynamic, None)
    quantize_onnx(plain, static, [images])

    def start(file: Path) -> Step:
        session = open_onnx(file)
        return lambda: session(images)[0]

    files = {"ONNX": plain, "ONNX, int8 dynamic": dynamic, "ONNX, int8 static": static}
    return {name: partial(start, file) for name, file in files.items()}
