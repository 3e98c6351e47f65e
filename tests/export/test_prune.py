"""Pruned models: smaller matrices, the right ones gone, and folders that open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.export.small import OPTIONS, noise, saved, small
from vitscale.errors import ConfigError
from vitscale.export.prune import magnitudes, opens_in, prune, taylor
from vitscale.interop.pretrained import load_model
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

HEADS, UNITS, WIDTH = 4, 64, 8
LABELLED = [(noise(3, small()), torch.tensor([0, 3, 1])), (noise(2, small()), torch.tensor([4, 2]))]


def layers(model: ViTPreTrainedModel) -> Any:
    return model.get_submodule("encoder" if isinstance(model, ViTModel) else "vit.encoder").layers


@torch.no_grad()
def silence(model: ViTPreTrainedModel, what: str, places: list[list[int]]) -> None:
    """Let heads or units of each block give nothing."""
    for layer, gone in zip(layers(model), places, strict=True):
        for place in gone:
            if what == "heads":
                layer.attention.output.weight[:, WIDTH * place : WIDTH * (place + 1)] = 0
            else:
                layer.mlp.fc2.weight[:, place] = 0


@pytest.mark.parametrize("by", ["magnitude", "loss"])
@pytest.mark.parametrize("options", ["plain", "dinov3", "timm"])
@pytest.mark.parametrize(
    ("what", "places"),
    [("heads", [[0, 2], [1, 3]]), ("mlp", [list(range(0, 32, 2)) + list(range(40, 56)), list(range(32))])],
)
def test_what_does_nothing_goes_first(what: str, places: list[list[int]], options: str, by: str) -> None:
    model = small(**OPTIONS[options])
    silence(model, what, places)
    images = noise(3, model)
    expected = model(images).logits
    scores = magnitudes(model, what) if by == "magnitude" else taylor(model, what, LABELLED)
    smaller = prune(model, what, 0.5, scores)
    torch.testing.assert_close(smaller(images).logits, expected, rtol=1e-4, atol=1e-5)
    for layer in layers(smaller):
        halves = 2 if model.config.swiglu else 1
        if what == "heads":
            assert layer.attention.attention.qkv.weight.shape == (3 * 2 * WIDTH, 32)
            assert layer.attention.output.weight.shape == (32, 2 * WIDTH)
        else:
            assert layer.mlp.fc1.weight.shape == (halves * UNITS // 2, 32)
            assert layer.mlp.fc2.weight.shape == (32, UNITS // 2)
    assert smaller.forward_flops() < model.forward_flops()
    torch.testing.assert_close(model(images).logits, expected, rtol=0, atol=0), "the model itself is as it was"
    assert all(parameter.grad is None for parameter in smaller.parameters())


def test_the_least_important_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """By scores as given, block by block, and those that stay keep their order."""
    model = small()
    scores = [torch.tensor([0.1, 4.0, 0.2, 3.0]), torch.tensor([9.0, 0.0, 8.0, 7.0])]
    kept = [[1, 3], [0, 2]]
    smaller = prune(model, "heads", 0.5, scores)
    for old, new, heads in zip(layers(model), layers(smaller), kept, strict=True):
        parts = old.attention.attention.qkv.weight.view(3, HEADS, WIDTH, 32)[:, heads].reshape(-1, 32)
        assert torch.equal(new.attention.attention.qkv.weight, parts)
        bias = old.attention.attention.qkv.bias.view(3, HEADS, WIDTH)[:, heads].flatten()
        assert torch.equal(new.attention.attention.qkv.bias, bias)


@pytest.mark.parametrize("what", ["heads", "mlp"])
def test_importance_by_loss_is_the_gradient_of_a_gate(what: str) -> None:
    """As Michel et al. define it: |d loss / d gate| of a factor 1 on each head's or unit's output, by images."""
    model = small()
    found = taylor(model, what, LABELLED)
    count = HEADS if what == "heads" else UNITS
    expected = [torch.zeros(count) for _ in layers(model)]
    for images, labels in LABELLED:
        for image, label in zip(images, labels, strict=True):
            gates = [torch.ones(count, requires_grad=True) for _ in expected]

            def gated(place: int, gates: list[Tensor] = gates) -> Any:
                factor = gates[place].repeat_interleave(WIDTH if what == "heads" else 1)
                return lambda module, inputs: (inputs[0] * factor,)

            outlets = [layer.attention.output if what == "heads" else layer.mlp.fc2 for layer in layers(model)]
            hooks = [outlet.register_forward_pre_hook(gated(place)) for place, outlet in enumerate(outlets)]
            loss = model(image[None], labels=label[None]).loss
            for total, gradient in zip(expected, torch.autograd.grad(loss, gates), strict=True):
                total += gradient.abs() / 5
            for hook in hooks:
                hook.remove()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("what", "keys"), [
    ("heads", {"num_attention_heads": 3, "head_dim": WIDTH}), ("mlp", {"intermediate_size": 48}),
])  # fmt: skip
def test_folders_open_here_and_in_transformers(what: str, keys: dict[str, int], tmp_path: Path) -> None:
    model = small(qkv_bias=False)
    smaller = prune(model, what, 0.25, magnitudes(model, what))
    for name, value in keys.items():
        assert getattr(smaller.config, name) == value
    assert smaller.config.beyond_transformers == []
    images = noise(2, model)
    expected = smaller(images).logits
    folder = saved(smaller, tmp_path / "pruned")
    again = load_model(folder)
    assert again.config == smaller.config
    torch.testing.assert_close(again(images).logits, expected, rtol=0, atol=0)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(theirs(images).logits, expected, rtol=1e-5, atol=1e-5)
    twice = prune(again, what, 0.34, magnitudes(again, what))
    assert twice.forward_flops() < again.forward_flops()
    assert twice(images).logits.shape == (2, 5)


def test_other_models(tmp_path: Path) -> None:
    encoder = small(ViTModel)
    smaller = prune(encoder, "heads", 0.5, magnitudes(encoder, "heads"))
    assert smaller(noise(2, encoder)).pooler_output.shape == (2, 32)
    again = load_model(saved(smaller, tmp_path / "encoder"))
    torch.testing.assert_close(again(noise(2, encoder)).pooler_output, smaller(noise(2, encoder)).pooler_output)
    masked = small(ViTForMaskedImageModeling)
    assert prune(masked, "mlp", 0.5, magnitudes(masked, "mlp")).config.intermediate_size == 32
    autoencoder = small(ViTMAEForPreTraining, decoder_hidden_size=16, decoder_num_attention_heads=2)
    smaller = prune(autoencoder, "mlp", 0.5, magnitudes(autoencoder, "mlp"))
    load_model(saved(smaller, tmp_path / "mae"))
    with pytest.raises(ConfigError, match="take mlp, or the encoder alone"):
        prune(autoencoder, "heads", 0.5, magnitudes(autoencoder, "heads"))


@pytest.mark.parametrize(("options", "what", "libraries"), [
    ("plain", "mlp", "vitscale and transformers"),
    ("plain", "heads", "vitscale, and in transformers 5.9 or later"),
    ("dinov3", "heads", "vitscale alone"),
])  # fmt: skip
def test_who_opens_the_folder(options: str, what: str, libraries: str) -> None:
    model = small(**OPTIONS[options])
    assert opens_in(prune(model, what, 0.5, magnitudes(model, what)).config).partition(":")[0] == libraries


@pytest.mark.parametrize(("what", "fraction", "stay"), [
    ("heads", 0.26, 3), ("heads", 0.99, 1), ("mlp", 0.5, 32), ("mlp", 0.1, 56), ("mlp", 0.999, 8),
])  # fmt: skip
def test_what_stays_is_rounded(what: str, fraction: float, stay: int) -> None:
    model = small()
    config = prune(model, what, fraction, magnitudes(model, what)).config
    assert (config.num_attention_heads if what == "heads" else config.intermediate_size) == stay


@pytest.mark.parametrize(("what", "fraction"), [("heads", 0.1), ("mlp", 0.01), ("mlp", 1.0), ("heads", -0.5)])
def test_nothing_to_take_away(what: str, fraction: float) -> None:
    model = small()
    with pytest.raises(ConfigError, match=rf"--prune {what} {fraction}: leaves"):
        prune(model, what, fraction, magnitudes(model, what))
