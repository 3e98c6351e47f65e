"""Each operation on values beside Pillow's, or torchvision's where Pillow has none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tests.augment.pictures import as_pillow, as_tensor, pictures
from vitscale.augment import pixels

Reference = Callable[[Image.Image, float], Image.Image]

PILLOW: dict[str, tuple[Reference, list[float]]] = {
    "brightness": (lambda image, value: ImageEnhance.Brightness(image).enhance(value), [0.0, 0.1, 0.7, 1.0, 1.9]),
    "contrast": (lambda image, value: ImageEnhance.Contrast(image).enhance(value), [0.0, 0.1, 0.7, 1.0, 1.9]),
    "saturation": (lambda image, value: ImageEnhance.Color(image).enhance(value), [0.0, 0.1, 0.7, 1.0, 1.9]),
    "sharpness": (lambda image, value: ImageEnhance.Sharpness(image).enhance(value), [0.0, 0.1, 0.7, 1.0, 1.9]),
    "greyscale": (lambda image, value: image.convert("L").convert(image.mode), [0.0]),
    "invert": (lambda image, value: ImageOps.invert(image), [0.0]),
    "autocontrast": (lambda image, value: ImageOps.autocontrast(image), [0.0]),
    "equalize": (lambda image, value: ImageOps.equalize(image), [0.0]),
    "solarize": (lambda image, value: ImageOps.solarize(image, int(value)), [0.0, 1.0, 77.0, 128.0, 255.0, 256.0]),
    "posterize": (lambda image, value: ImageOps.posterize(image, int(value)), [1.0, 3.0, 4.0, 7.0, 8.0]),
}
NEEDS_RGB = ("saturation", "greyscale")
EXACT = ("invert", "equalize", "solarize", "posterize")


def run(name: str, images: torch.Tensor, value: float) -> torch.Tensor:
    return getattr(pixels, name)(images, torch.full((len(images),), value))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PILLOW)
def test_as_pillow_within_two_levels(name: str, channels: int) -> None:
    if channels == 1 and name in NEEDS_RGB:
        pytest.skip("of red, green and blue; config/check.py refuses it")
    reference, values = PILLOW[name]
    images = pictures(channels=channels)
    for value in values:
        expected = torch.stack([as_tensor(reference(as_pillow(image), value)) for image in images])
        most = 0 if name in EXACT else 2
        assert float((run(name, images, value) - expected).abs().max()) <= most, value


def test_solarize_add_is_timms() -> None:
    from timm.data.auto_augment import solarize_add

    images = pictures()
    for value in (0, 30, 110):
        expected = torch.stack([as_tensor(solarize_add(as_pillow(image), value)) for image in images])
        assert torch.equal(run("solarize_add", images, value), expected)


def test_hue_is_torchvisions() -> None:
    from torchvision.transforms.v2.functional import adjust_hue

    images = pictures()
    for value in (-0.5, -0.2, 0.0, 0.1, 0.37):
        expected = 255 * adjust_hue(images / 255, value)
        torch.testing.assert_close(run("hue", images, value), expected, rtol=0, atol=1e-3)


def test_blur_is_a_gaussian_and_near_pillows() -> None:
    from torchvision.transforms.v2.functional import gaussian_blur

    images = pictures()
    for value in (0.1, 0.8, 2.0):
        ours = run("blur", images, value)
        theirs = gaussian_blur(images, [13, 13], [value, value])
        inner = (..., slice(7, -7), slice(7, -7))  # torchvision mirrors the border
        torch.testing.assert_close(ours[inner], theirs[inner], rtol=0, atol=1e-3)
        blurred = [as_pillow(image).filter(ImageFilter.GaussianBlur(value)) for image in images]
        difference = (ours - torch.stack([as_tensor(image) for image in blurred])).abs()
        assert float(difference.max()) <= 6
        assert float(difference.mean()) < 0.6


@settings(max_examples=40)
@given(st.sampled_from(sorted({*PILLOW, "solarize_add", "hue", "blur"})), st.integers(0, 10**6))
def test_any_company_and_any_fraction(name: str, seed: int) -> None:
    """Values with fractions stay in [0, 255], and an image's result does not depend on the others of its batch."""
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.uniform(0, 255, (4, 3, 9, 7)).astype(np.float32))
    low, high = {"hue": (-0.5, 0.5), "posterize": (0, 8), "blur": (0.1, 2)}.get(name, (0, 2))
    values = torch.from_numpy(random.uniform(low, high, 4).astype(np.float32))
    together = getattr(pixels, name)(images, values)
    assert float(together.min()) >= -1e-3
    assert float(together.max()) <= 255.001
    for place in range(4):
        alone = getattr(pixels, name)(images[place : place + 1], values[place : place + 1])
        torch.testing.assert_close(together[place : place + 1], alone, rtol=0, atol=1e-3)
