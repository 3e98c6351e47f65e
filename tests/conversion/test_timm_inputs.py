"""Images become what timm makes of them, by a processor of ours and the other way round."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitscale.errors import ConfigError
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.timm_inputs import input_content, processor_of
from vitscale.models.configuration import ViTConfig

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("size", "content"),
    [
        (72, {"crop_pct": 0.9}),
        (56, {"crop_pct": 0.875, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}),
        (64, {"crop_pct": 1.0, "interpolation": "lanczos"}),
        (64, {"crop_pct": 0.8, "crop_mode": "squash"}),
        ((24, 40), {"crop_pct": 1.0, "crop_mode": "squash"}),
    ],
)
@pytest.mark.parametrize("picture", [(41, 82), (150, 100), (64, 64)])  # what is cut is even: see processor_of
def test_images_become_what_timm_makes_of_them(
    size: int | tuple[int, int], content: dict[str, Any], picture: tuple[int, int]
) -> None:
    height, width = size if isinstance(size, tuple) else (size, size)
    usual: dict[str, Any] = {"input_size": [3, height, width], "interpolation": "bicubic"}
    content = usual | {"mean": [0.5] * 3, "std": [0.5] * 3} | content
    ours, notes = processor_of(content, ViTConfig(image_size=size, patch_size=8))
    assert notes == []
    pixels = np.random.default_rng(0).integers(0, 256, (*picture, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((picture[1], picture[0]))
    theirs = timm.data.create_transform(**content)(image)
    found = ours(image, return_tensors="pt").pixel_values[0]
    assert found.shape == theirs.shape
    assert torch.allclose(found, theirs, atol=1.01 / 255 / min(content["std"])), (found - theirs).abs().max()

    back = input_content(ours, ViTConfig(image_size=size, patch_size=8))
    again = timm.data.create_transform(**{key: back[key] for key in back if key != "fixed_input_size"})(image)
    assert torch.allclose(again, theirs, atol=1e-6)


def test_an_images_way_that_only_one_side_has() -> None:
    config = ViTConfig(image_size=(24, 40), patch_size=8)
    ours, notes = processor_of({"crop_mode": "center", "crop_pct": 0.9, "interpolation": "random"}, config)
    assert ours.size == {"height": 24, "width": 40}
    assert len(notes) == 2
    with pytest.raises(ConfigError, match="timm's transform cannot"):
        input_content(ViTImageProcessor(size={"shortest_edge": 24}), config)
    with pytest.raises(ConfigError, match=r"mean=.*4 channels"):
        processor_of({"mean": [0.5, 0.5, 0.5]}, ViTConfig(num_channels=4))


def test_another_scale_of_pixels_is_another_mean() -> None:
    plain = ViTImageProcessor(size=224, rescale_factor=1 / 127.5, image_mean=1.0, image_std=0.5)
    content = input_content(plain, ViTConfig())
    assert content["mean"] == pytest.approx([0.5] * 3)
    assert content["std"] == pytest.approx([0.25] * 3)
