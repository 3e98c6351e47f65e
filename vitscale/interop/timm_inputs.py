"""How images become a model's input: timm's pretrained_cfg on one side, our processor on the other."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

from vitscale.config.model_rules import pair
from vitscale.config.typed import is_finite
from vitscale.errors import ConfigError
from vitscale.interop.image_processing import RESAMPLE, ViTImageProcessor, per_channel, processor_for
from vitscale.interop.timm_names import IMAGENET_MEAN, IMAGENET_STD
from vitscale.models.configuration import ViTConfig

_CROP_PCT = 0.875  # PretrainedCfg's defaults


def processor_of(content: dict[str, Any], config: ViTConfig) -> tuple[ViTImageProcessor, list[str]]:
    """The processor that does what timm's evaluation transform does, and what it does otherwise.

    content: a pretrained_cfg. Where the crop leaves out an odd number of pixels, timm's lies half a pixel
    to the one side of the middle and this processor's, as transformers', to the other. ConfigError where
    its numbers are none.
    """
    notes: list[str] = []
    height, width = pair(config.image_size)
    crop_pct, mode = content.get("crop_pct") or _CROP_PCT, content.get("crop_mode") or "center"
    if not is_finite(crop_pct) or crop_pct < 0.01:
        raise ConfigError(f"crop_pct={crop_pct!r}: must be a share of the image, above 0.01")
    scaled = math.floor(height / crop_pct), math.floor(width / crop_pct)
    size: Any = None if scaled == (height, width) else scaled
    if mode == "center" and scaled[0] == scaled[1]:
        size = {"shortest_edge": scaled[0]}
    elif mode != "squash":
        notes.append(f"crop_mode={mode} to {height}x{width}: images are resized to that, whatever their aspect ratio")
        size = None
    interpolation = str(content.get("interpolation") or "bicubic")
    if interpolation not in RESAMPLE:
        notes.append(f"interpolation={interpolation}: bicubic instead")
        interpolation = "bicubic"
    mean = per_channel("mean", content.get("mean") or IMAGENET_MEAN, config.num_channels)
    std = per_channel("std", content.get("std") or IMAGENET_STD, config.num_channels)
    return processor_for(config, mean, std, size, interpolation), notes


def input_content(processor: ViTImageProcessor, config: ViTConfig) -> dict[str, Any]:
    """The keys of pretrained_cfg for the images of this processor, made for this config.

    ConfigError for what timm's transform cannot do.
    """
    height, width = pair(config.image_size)
    mode, crop_pct = _crop(processor, height, width)
    # timm takes pixels in [0, 1]: another scale of them is another mean and deviation.
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    channels = config.num_channels
    return {
        "input_size": [channels, height, width],
        "fixed_input_size": True,
        "interpolation": Image.Resampling(processor.resample).name.lower(),
        "crop_pct": crop_pct,
        "crop_mode": mode,
        "mean": [value / scale for value in per_channel("image_mean", mean, channels)],
        "std": [value / scale for value in per_channel("image_std", std, channels)],
    }


def _crop(processor: ViTImageProcessor, height: int, width: int) -> tuple[str, float]:
    """timm's crop_mode and crop_pct."""
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    if not processor.do_resize or (crop is None and size == {"height": height, "width": width}):
        return "squash", 1.0  # to exactly that size, without a crop
    if crop == {"height": height, "width": width}:
        if set(size) == {"shortest_edge"} and height == width:
            return "center", _share((height, width), (size["shortest_edge"],) * 2)
        if "height" in size:
            return "squash", _share((height, width), (size["height"], size["width"]))
    raise ConfigError(
        f"size={size}, crop_size={crop}: timm's transform cannot make {height}x{width} pixels of an image so; "
        f"give the processor a size of height={height} and width={width}"
    )


def _share(inner: tuple[int, int], outer: tuple[int, int]) -> float:
    """crop_pct, of which timm makes floor(inner / crop_pct)."""
    for share in (inner[0] / outer[0], inner[0] / (outer[0] + 0.5), inner[1] / (outer[1] + 0.5)):
        if share <= 1 and tuple(math.floor(side / share) for side in inner) == outer:
            return share
    raise ConfigError(f"size={outer}: timm's transform has one crop_pct for both sides, which must give {inner}")
