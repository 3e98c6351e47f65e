"""The figures' content; their looks were checked by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from vitscale.evaluation.figures import LOSS, RATE, Reconstructions, draw_curves, draw_reconstructions, reconstruct
from vitscale.models.auto import initialize
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTPreTrainedModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DECODER = {"decoder_hidden_size": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def a_model(kind: str, channels: int) -> ViTPreTrainedModel:
    sizes = SIZES | {"image_size": (16, 24), "patch_size": 4, "num_channels": channels}
    if kind == "simmim":
        model = ViTForMaskedImageModeling(ViTConfig(**sizes, encoder_stride=4, mask_patch=2))
    else:
        own = {"decoder_num_hidden_layers": 1, "norm_pix_loss": kind == "mae, norm-pix"}
        model = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **DECODER, **own))
    initialize(model, 0)
    return model


def some_images(channels: int) -> torch.Tensor:
    return torch.rand(3, channels, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["mae", "mae, norm-pix", "simmim"])
def test_panels_show_what_was_hidden_and_nothing_else(kind: str, channels: int) -> None:
    model, images = a_model(kind, channels), some_images(channels)
    mean, std = (values[:channels] for values in (MEAN, STD))
    normalised = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    panels = reconstruct(model, normalised, torch.tensor([1, 2, 3]), mean, std)
    np.testing.assert_allclose(panels.original, images.permute(0, 2, 3, 1), atol=1e-6)
    hidden = np.isnan(panels.masked).all(axis=-1)
    per_patch = hidden.reshape(3, 4, 4, 6, 4).mean(axis=(2, 4))
    assert set(np.unique(per_patch)) == {0.0, 1.0}  # whole patches
    # 75% of 24 patches; 60% of 6 cells of 4 patches, rounded up
    assert per_patch.sum(axis=(1, 2)).tolist() == [16.0 if kind == "simmim" else 18.0] * 3
    assert not np.array_equal(per_patch[0], per_patch[1])
    for panel in (panels.masked, panels.reconstruction):
        np.testing.assert_array_equal(panel[~hidden], panels.original[~hidden])
    assert np.abs(panels.reconstruction - panels.original)[hidden].mean() > 0.01
    assert ("norm_pix_loss" in panels.note) == (kind == "mae, norm-pix")


def test_norm_pix_reconstruction_has_the_true_brightness() -> None:
    model, images = a_model("mae, norm-pix", 1), some_images(1) / 2 + 0.25
    panels = reconstruct(model, images, torch.tensor([1, 2, 3]), (0.0,), (1.0,))
    by_patch = [images.reshape(3, 4, 4, 6, 4).mean(axis=(2, 4)) for images in (panels.original, panels.reconstruction)]
    np.testing.assert_allclose(*by_patch, atol=0.12)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_reconstructions_become_a_png(channels: int, tmp_path: Path) -> None:
    grid = np.random.default_rng(0).random((3, 4, 8, 8, channels), dtype=np.float32)
    path = tmp_path / "figures" / "reconstructions.png"
    draw_reconstructions(Reconstructions(*grid, note="a note"), path, "step 100")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_curves_become_the_same_png_from_the_same_rows(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1 / step if step != 30 else None, "lr": 1e-3} for step in range(10, 200, 10)]
    for name in ("a.png", "b.png"):
        draw_curves(rows, tmp_path / name, "a run")
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    draw_curves(rows[:9], tmp_path / "c.png")
    assert first != (tmp_path / "c.png").read_bytes()


@pytest.mark.parametrize(
    "rows, drawn",
    [
        ([], set()),
        ([{"step": 1, "lr": 0.1}], set()),
        ([{"step": 1, "loss": 0.5, "lr": 0.1}], {LOSS, RATE}),
        ([{"step": 1, "loss": None, "lr": 0.1}], {RATE}),
        ([{"step": 1, "loss": 0.5}], {LOSS}),
        ([{"step": 1, "loss": 0.5, "lr": 0.1}, {"step": 2, "loss": None, "lr": 0.1}], {LOSS, RATE}),
    ],
)
def test_few_rows_are_drawn_as_dots(rows: list[dict[str, Any]], drawn: set[str], tmp_path: Path) -> None:
    """A line through one point would show nothing: a dot is over 100 pixels, the number beside it fewer."""
    draw_curves(rows, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        image = np.asarray(picture.convert("RGB"))
    for colour in (LOSS, RATE):
        rows_of, _ = np.nonzero((image == ImageColor.getrgb(colour)).all(axis=-1))
        assert (len(rows_of) > 100) == (colour in drawn), colour
        if colour in drawn:
            upper = rows_of < len(image) * 0.66
            assert upper.all() if colour == LOSS else not upper.any(), "the loss above, the rate below"
