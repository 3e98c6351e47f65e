"""A model made ready to be run on images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.loading import open_model
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.text import to_stderr


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device, and the processor that came with it."""

    source: str  # as it was named
    model: ViTPreTrainedModel
    processor: ViTImageProcessor
    device: torch.device

    def require_finite(self, values: Tensor, names: list[str]) -> None:
        """CheckpointError where an image's outputs [n, ...] are not all numbers."""
        finite = torch.isfinite(values).flatten(1).all(dim=1)
        if not finite.all():
            name = names[int(finite.int().argmin())]
            raise CheckpointError(
                f"{self.source}: gives NaN or infinity for {name}: its weights are damaged, or these pixels too large"
            )


def load(source: str, device: str | None, runs_images: bool = True, take: str | None = None) -> Loaded:
    """A model by whatever `open_model` takes, whose notes go to stderr. ConfigError where it and its processor do not
    fit, if images will be run.

    device: torch's name of one; None: the GPU where there is one. take: which of a file's sets of weights.
    """
    place = _device(device)
    opened = open_model(source, take=take)
    model, size = opened.model, opened.processor.output_size
    if runs_images and opened.any_size and size not in (None, pair(model.config.image_size)):
        model = type(model).from_pretrained(source, take=take, image_size=size)  # as its library runs it; says notes
    else:
        to_stderr(*(f"{source}: {note}" for note in opened.notes))
    if runs_images:
        _require_fit(source, model, opened.processor)
    return Loaded(source, model.to(place), opened.processor, place)


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # meta makes tensors, but of no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: cannot be used ({reason}); leave it out, or take cpu") from None
    return device


def _require_fit(source: str, model: ViTPreTrainedModel, processor: ViTImageProcessor) -> None:
    config, size = model.config, processor.output_size
    if processor.num_channels not in (None, config.num_channels):
        raise ConfigError(
            f"{source}: its preprocessor_config.json is for {processor.num_channels} channels (image_mean), "
            f"its model for num_channels={config.num_channels}; save the processor of this model beside it"
        )
    if size != pair(config.image_size):
        given = f"{size[0]}x{size[1]} pixels" if size else "their own size"
        raise ConfigError(
            f"{source}: its preprocessor_config.json gives images of {given}, its model takes image_size="
            f"{config.image_size}: set `size` (or `crop_size`) there to resize to it, call the model in Python "
            "with interpolate_pos_encoding=True, or take a model of that size"
        )
