"""`vitscale bench step`: this project's training step beside transformers' and timm's, of MAE or classification.

A step is forward, backward and optimizer: clipping, AdamW and the clearing of gradients, the same for all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.bench.peers import Comparison, Note, Step, logits, models_parser, report_models, run_config
from vitscale.bench.rounds import check_file
from vitscale.config.schema import Optimizer
from vitscale.engine.optim import make_optimizer
from vitscale.models.vit import ViTPreTrainedModel

LR = 1e-4
CLIP = 1.0  # as in most recipes
PARTS = ("forward", "backward", "optimizer")


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    result = measure(arguments)
    report_models(f"A training step ({result['objective']})", result, PARTS)
    return 0


def measure(arguments: Sequence[str], note: Note | None = None, only: Collection[str] | None = None) -> dict[str, Any]:
    """What `main` prints as JSON; note, only: see Comparison.measure."""
    parser = models_parser("step", __doc__)
    parser.add_argument("--objective", choices=("mae", "classification"), default="mae", help="default: mae")
    parser.add_argument("--trace", type=Path, metavar="FILE",
                        help="also trace a step of each, for ui.perfetto.dev (.json or .json.gz)")  # fmt: skip
    options = parser.parse_args(arguments)
    check_file("--trace", options.trace)
    comparison = Comparison(options, run_config(options.preset, options.objective), trains=True)
    result = {"bench": "step", **comparison.measure(comparison.starts(partial(training_step, comparison)), note, only)}
    if options.trace is not None:
        comparison.trace(options.trace)
    return result


def training_step(comparison: Comparison, model: nn.Module) -> Step:
    """A step that returns its loss."""
    model.train()
    optimizer = make_optimizer(model, Optimizer())
    for group in optimizer.param_groups:
        group["lr"] = LR
    labels = comparison.labels if comparison.run.objective.needs_labels else None
    part, weights = comparison.parts, list(model.parameters())

    def step() -> Tensor:
        with part("forward"), comparison.autocast:
            loss = _loss(model, comparison.images, labels)
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _loss(model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    """The loss of any library's model; MAE has no labels."""
    if isinstance(model, ViTPreTrainedModel):
        inputs = {} if labels is None else {"labels": labels}
        return model(images, sample_key=torch.arange(len(images), device=images.device), **inputs).loss
    if labels is None:
        output = model(images)
        return output[0] if isinstance(output, tuple) else output.loss
    return F.cross_entropy(logits(model, images), labels)
