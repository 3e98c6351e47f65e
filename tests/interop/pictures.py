"""Pictures of every kind, and transformers' processors to hold ours against."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

transformers = pytest.importorskip("transformers")
pil_backend = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")

THEIRS = {"pil": pil_backend.ViTImageProcessorPil, "torchvision": transformers.ViTImageProcessor}
LEVEL = 2 / 255  # one of 255 levels, once normalized by 0.5 and 0.5
GRACE_HOPPER = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"

by_both = pytest.mark.parametrize("backend", THEIRS)


def photograph(name: str) -> Image.Image:
    if name == "grace_hopper":
        with Image.open(GRACE_HOPPER) as image:
            return image.convert("RGB")
    return Image.fromarray(load_sample_image(f"{name}.jpg"))


CHINA = photograph("china")


def exif_turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    CHINA.save(stream, "JPEG", exif=exif, quality=90)
    return stream.getvalue()


def transparent() -> Image.Image:
    """Opaque at the left, clear at the right."""
    image = CHINA.convert("RGBA")
    image.putalpha(Image.fromarray(np.broadcast_to(np.linspace(255, 0, CHINA.width), CHINA.size[::-1]).astype("uint8")))
    return image


def with_clear_colour() -> Image.Image:
    image = CHINA.convert("P")
    image.info["transparency"] = np.asarray(image)[0, 0].item()
    return image


def sixteen_bits() -> Image.Image:
    """A 16-bit greyscale PNG, opened; its low bytes are not its high ones."""
    grey = np.asarray(CHINA.convert("L")).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(grey << 8 | 255 - grey).save(stream, "PNG")
    return Image.open(io.BytesIO(stream.getvalue()))


PICTURES = {
    "china": CHINA,
    "flower": photograph("flower"),
    "grace_hopper": photograph("grace_hopper"),
    "grey": CHINA.convert("L"),
    "rgba": transparent(),
    "grey_alpha": transparent().convert("LA"),
    "palette": CHINA.convert("P"),
    "palette_clear": with_clear_colour(),
    "cmyk": CHINA.convert("CMYK"),
    "black_white": CHINA.convert("1"),
    "small": CHINA.resize((31, 17)),
}


def pixels(batch: Any) -> np.ndarray:
    return np.asarray(batch["pixel_values"])


def assert_alike(ours: Any, theirs: Any, within: float = LEVEL) -> None:
    a, b = pixels(ours), pixels(theirs)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.abs(a.astype(np.float64) - b).max() <= within + 1e-5
