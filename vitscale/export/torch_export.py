"""torch.export's .pt2: a graph with its weights that torch opens without this package."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vitscale.errors import ConfigError
from vitscale.export.agreement import Runner
from vitscale.export.served import Served


def int8_weights(served: Served) -> Served:
    """A copy whose linear layers keep their weights as int8, a scale a row, multiplied in float32 (torchao).

    ConfigError where torchao is not there, or not one for this torch.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells of every kernel that another machine would need
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        from torchao.utils import unwrap_tensor_subclass
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"--quantize int8-weights: needs a torchao for torch {torch.__version__} ({error}): pip install --no-deps "
            "torchao; or take --format onnx --quantize dynamic"
        ) from None
    finally:
        logging.disable(before)
    served = copy.deepcopy(served)
    quantize_(served, Int8WeightOnlyConfig())
    unwrap_tensor_subclass(served)  # plain tensors: whoever opens the file needs no torchao
    return served


def write_torch_export(program: ExportedProgram, path: Path, about: Mapping[str, Any]) -> None:
    """Save a graph; `about`: file names and their content as JSON, kept in the file beside it."""
    program.example_inputs = None  # random numbers, of no use to whoever loads it
    extra = {name: json.dumps(content) for name, content in about.items()}
    torch.export.save(program, path, extra_files=extra)


def open_torch_export(path: Path) -> Runner:
    """The file as a function of pixels [n, channels, height, width]."""
    module = torch.export.load(path).module()

    @torch.no_grad()
    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(pixel_values))

    return run
