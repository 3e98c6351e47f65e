"""Attention maps against transformers' own weights, rollout against a plain computation, and the overlay's pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.shapes import inputs, tiny
from vitscale.inspection.attention import ATTENDED, AttentionMaps, attention_maps, draw, laid_over, rollout, scales_of
from vitscale.interop.pretrained import save_model
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

WITHOUT_CLS = {"use_cls_token": False, "pooling": "mean"}


def sharp(model_class: type[ViTPreTrainedModel], **keys: Any) -> ViTPreTrainedModel:
    """A model whose attention is far from uniform, in evaluation mode."""
    model = tiny(model_class, **keys)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name or "position" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_maps_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = sharp(ViTForImageClassification, image_size=(16, 24))
    save_model(tmp_path, "ViTForImageClassification", ours.config, ours.state_dict(), [0.5] * 3, [0.5] * 3)
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    pixels = inputs(ours, 1)["pixel_values"]
    with torch.no_grad():
        attentions = theirs(pixels, output_attentions=True).attentions
    maps = attention_maps(ours, pixels)
    last = attentions[-1][0, :, 0, 1:].numpy().reshape(2, 4, 6)
    np.testing.assert_allclose(maps.heads, last / last.mean((1, 2), keepdims=True), rtol=1e-4)
    reached = np.eye(25)
    for layer in attentions:
        reached = (0.5 * layer[0].mean(0).numpy() + 0.5 * np.eye(25)) @ reached
    expected = reached[0, 1:].reshape(4, 6)
    np.testing.assert_allclose(maps.rollout, expected / expected.mean(), rtol=1e-4)
    assert maps.rollout.std() > 0.1


def test_rollout_follows_where_tokens_came_from() -> None:
    """Layer 1 moves token 2 to 1, layer 2 token 1 to 0: token 0 knows of 2 only by way of 1."""
    first, second = torch.eye(3), torch.eye(3)
    first[1], second[0] = torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 0])
    reached = rollout([first.expand(4, 3, 3), second.expand(4, 3, 3)])
    assert torch.allclose(reached[0], torch.tensor([0.5, 0.25, 0.25]))
    assert torch.allclose(reached.sum(-1), torch.ones(3))


@pytest.mark.parametrize("registers", [0, 2])
def test_without_a_class_token_it_is_the_attention_received(registers: int) -> None:
    model = sharp(ViTForImageClassification, **WITHOUT_CLS, num_register_tokens=registers, image_size=(8, 16))
    pixels = inputs(model, 1)["pixel_values"]
    with torch.no_grad():
        weights = model.vit(pixels, output_attentions=True).attentions[-1][0]
    expected = weights[:, registers:, registers:].mean(1).reshape(2, 2, 4)
    maps = attention_maps(model, pixels)
    np.testing.assert_allclose(maps.heads, expected / expected.mean((1, 2), keepdim=True), rtol=1e-4)
    assert maps.rollout.shape == (2, 4)
    assert "received" in maps.asker


@pytest.mark.parametrize("model_class", [ViTModel, ViTMAEForPreTraining, ViTForMaskedImageModeling])
def test_nothing_is_hidden_and_other_sizes_work(model_class: type[ViTPreTrainedModel]) -> None:
    model = sharp(model_class).train()
    maps = attention_maps(model, torch.randn(1, 3, 24, 12, generator=torch.Generator().manual_seed(0)))
    assert maps.heads.shape == (2, 6, 3)
    np.testing.assert_allclose(maps.heads.mean((1, 2)), 1, rtol=1e-5)
    assert model.training


def test_an_attended_patch_is_coloured_and_the_others_are_the_image() -> None:
    grey = np.linspace(0, 1, 32 * 48).reshape(32, 48, 1)
    strength = np.zeros((4, 6))
    strength[1, 5] = 1.0
    picture = laid_over(grey, strength)
    patch = np.s_[8:16, 40:48]
    assert np.abs(picture[patch] - ATTENDED).max() < 0.2
    picture[patch] = grey[patch]
    np.testing.assert_array_equal(picture, grey.repeat(3, axis=2))


def test_the_full_colour_is_for_one_patch_in_a_hundred() -> None:
    """So that a single patch of much attention does not hide where the others look."""
    maps = AttentionMaps(np.array([*range(1, 200), 5000.0]).reshape(2, 10, 10), np.arange(2.0, 6).reshape(2, 2), "")
    scales = scales_of(maps)
    assert [float(scales["heads"](value)) > 1 for value in (197, 199, 5000)] == [False, True, True]
    assert [float(scales["rollout"](value)) for value in (1, 5)] == [0, 1]
    even = scales_of(AttentionMaps(np.full((2, 2, 2), 1.01), np.full((2, 2), 0.99), ""))
    assert [(scale.vmin, scale.vmax) for scale in even.values()] == [(1, 2), (1, 2)], "no difference looks like none"


@pytest.mark.parametrize("channels, aspect", [(1, 1.0), (3, 0.6), (13, 2.0)])
def test_overlays_become_a_png(channels: int, aspect: float, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    maps = AttentionMaps(3 * random.random((5, 4, 6)), 3 * random.random((4, 6)), "of the class token")
    path = tmp_path / "figures" / "attention.png"
    draw(maps, random.random((32, 48, channels)), path, aspect, "a model")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        red, green, blue = (np.asarray(band, dtype=int) for band in picture.convert("RGB").split())
    assert ((red > green + 80) & (red > blue + 80)).mean() > 0.01
