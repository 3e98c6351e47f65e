"""A model in one library's files -> the same model in another's, read again and compared before it is there.

FROM is whatever interop/loading.py opens. TO appears whole, or not at all. Other libraries are not asked, so that the
verb does the same wherever it runs; tests/conversion holds what it writes against transformers and timm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.conversion import mae, timm
from vitscale.errors import CheckpointError, ConfigError, VitscaleError
from vitscale.files.atomic import replaced
from vitscale.interop.loading import open_model
from vitscale.interop.pretrained import save_pretrained
from vitscale.interop.vision_transformer import Opened
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel
from vitscale.text import listed

Outputs = dict[str, Tensor]
# Of the largest number in an output: what float32 and another order of sums leave, with a margin.
TOLERANCE = 1e-4
_BEYOND = "transformers' ViT has none of it; --to vitscale writes a folder that opens here, --to timm may too"


@dataclass(frozen=True)
class Comparison:
    """How far the outputs of what was written are from those of the model, on random images."""

    output: str  # the one that differs most
    difference: float  # the largest, absolute
    scale: float  # the largest number in that output

    @property
    def good(self) -> bool:
        return self.difference <= TOLERANCE * self.scale

    def line(self) -> str:
        return f"largest difference {self.difference:.1e} in {self.output}, of numbers up to {self.scale:.3g}"


@dataclass
class Report:
    """What became of every tensor, and how it was checked."""

    model: str
    kind: str  # of FROM: hf, timm or checkpoint
    tensors: int  # that FROM holds for this model, each of them used
    left_out: list[str] = field(default_factory=list)  # our names of what TO has no place for
    notes: list[str] = field(default_factory=list)
    comparison: Comparison | None = None

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = [f"{self.model} of {self.kind}: {self.tensors} tensors read, every one of them used"]
        if self.left_out:
            lines.append(f"not written, since the target has no place for them: {listed(self.left_out, limit=1000)}")
        lines += [f"note: {note}" for note in self.notes]
        if self.comparison is not None:
            lines.append(f"TO was read again and run on random images, as was FROM: {self.comparison.line()}")
        return lines


def convert(
    source: str | Path, to: Path, target: str, options: Mapping[str, Any] | None = None, take: str | None = None
) -> Report:
    """Write the model at `source` to `to` as `target` has it (hf, timm, mae or vitscale): a folder, for mae a file.

    options: what a bare file of weights leaves open; take: which of its sets of weights. `to` must not be there yet.
    ConfigError and CheckpointError name what cannot be read, what the target cannot express, and a failed check.
    """
    if target not in _WRITERS:
        raise ConfigError(f"target={target!r}: must be one of {', '.join(_WRITERS)}")
    if to.exists():
        raise ConfigError(f"{to}: is there already; name a new {'file' if target == 'mae' else 'folder'}")
    opened = open_model(source, options, take)
    report = Report(type(opened.model).__name__, opened.kind, opened.tensors, notes=list(opened.notes))
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{to.parent}: cannot be made: {error.strerror}; name another place") from None
    with replaced(to) as draft:
        try:
            left_out, notes = _WRITERS[target](draft, opened)
            report.left_out += left_out
            report.notes += notes
            report.comparison = compare(opened.model, open_model(draft).model)
        except VitscaleError as error:
            raise type(error)(str(error).replace(str(draft), str(to))) from None
        if not report.comparison.good:
            reasons = "".join(f"; {note}" for note in report.notes)
            raise CheckpointError(
                f"{to}: is not written, since outputs on random images differ by more than {TOLERANCE:.0e} of their "
                f"scale: {report.comparison.line()}{reasons}"
            )
    return report


def compare(model: ViTPreTrainedModel, again: ViTPreTrainedModel) -> Comparison:
    """The output, of those that both models have, whose difference is largest for its scale."""
    expected, actual = _outputs(model), _outputs(again)
    comparisons = []
    for name in sorted(expected.keys() & actual.keys(), reverse=True):  # logits, of those that are equally near
        same = expected[name].shape == actual[name].shape
        difference = (expected[name] - actual[name]).abs().max().item() if same else float("inf")
        comparisons.append(Comparison(name, difference, expected[name].abs().max().item()))
    return max(comparisons, key=lambda each: (not each.good, each.difference / (each.scale or 1.0)))


@torch.no_grad()
def _outputs(model: ViTPreTrainedModel) -> Outputs:
    """What a model makes of random images of its size, the same each time: its encoder of whole images, and itself."""
    generator, config = torch.Generator().manual_seed(0), model.config
    pixel_values = torch.randn(2, config.num_channels, *pair(config.image_size), generator=generator)
    noise = torch.rand(2, config.num_patches, generator=generator)
    outputs = {"last_hidden_state": model.base_model(pixel_values).last_hidden_state}
    if isinstance(model, ViTMAEForPreTraining):
        return outputs | {"patches": model(pixel_values, noise=noise).logits}
    if isinstance(model, ViTForMaskedImageModeling):
        return outputs | {"reconstruction": model(pixel_values, bool_masked_pos=noise < 0.5).reconstruction}
    name = "pooler_output" if isinstance(model, ViTModel) else "logits"
    output = model(pixel_values).get(name)
    return outputs if output is None else outputs | {name: output}


def _write_hf(folder: Path, opened: Opened) -> tuple[list[str], list[str]]:
    beyond = opened.model.config.beyond_transformers
    if beyond:
        values = [f"{key}={getattr(opened.model.config, key)!r}" for key in beyond]
        raise ConfigError(f"{', '.join(values)}: {_BEYOND}")
    _write_vitscale(folder, opened)
    note = "transformers has no such class: its ViTForImageClassification takes all but the decoder"
    return [], [note] if isinstance(opened.model, ViTForMultitaskPreTraining) else []


def _write_vitscale(folder: Path, opened: Opened) -> tuple[list[str], list[str]]:
    save_pretrained(opened.model, folder, processor=opened.processor)
    return [], []


_WRITERS: dict[str, Callable[[Path, Opened], tuple[list[str], list[str]]]] = {
    "hf": _write_hf,
    "timm": timm.write_timm,
    "mae": mae.write_mae,
    "vitscale": _write_vitscale,
}
