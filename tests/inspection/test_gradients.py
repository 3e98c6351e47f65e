"""Gradient norms are those of the model's own backward, for every objective and kind of label."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.models.shapes import TRAINABLE, inputs, tiny
from vitscale.errors import ConfigError
from vitscale.inspection.gradients import as_table, draw, gradient_norms, random_labels
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel


def backward(model: ViTPreTrainedModel, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients of a plain backward, by name."""
    model.train().zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def norm(gradients: dict[str, torch.Tensor], start: str) -> float:
    return math.sqrt(sum(float((each**2).sum()) for name, each in gradients.items() if name.startswith(start)))


@pytest.mark.parametrize("model_class", TRAINABLE, ids=lambda c: c.__name__)
def test_norms_are_those_of_a_backward(model_class: type[ViTPreTrainedModel]) -> None:
    model = tiny(model_class, layer_scale_init_value=0.5, drop_path_rate=0.5, num_register_tokens=2)
    batch = inputs(model) | {"sample_key": torch.arange(6)}
    expected = backward(model, batch)
    found = gradient_norms(model, batch["pixel_values"], batch.get("labels"))
    by_name = {layer.name: layer for layer in found.layers}
    block = by_name["layers.1"]
    assert block.norm == pytest.approx(norm(expected, "vit.encoder.layers.1."), rel=1e-5)
    mlp = ("mlp.", "layernorm_after", "layer_scale_after")
    assert block.mlp == pytest.approx(
        math.hypot(*(norm(expected, f"vit.encoder.layers.1.{part}") for part in mlp)), rel=1e-5
    )
    assert math.hypot(block.attention, block.mlp) == pytest.approx(block.norm)
    assert by_name["embeddings"].norm == pytest.approx(norm(expected, "vit.embeddings."), rel=1e-5)
    assert math.hypot(*(layer.norm for layer in found.layers)) == pytest.approx(found.norm)
    assert found.norm == pytest.approx(norm(expected, ""), rel=1e-5)
    weights = sum(float(each.detach().square().sum()) for each in model.vit.encoder.layers[1].parameters()) ** 0.5
    assert block.weights == pytest.approx(weights)
    assert block.relative == pytest.approx(block.norm / weights)


PROBLEMS = [
    ({"num_labels": 1, "problem_type": None}, (4,), True),
    ({"num_labels": 3, "problem_type": "regression"}, (4, 3), True),
    ({"num_labels": 3, "problem_type": "multi_label_classification"}, (4, 3), True),
    ({"num_labels": 3, "problem_type": None}, (4,), False),
]


@pytest.mark.parametrize("keys, shape, is_float", PROBLEMS)
def test_random_labels_fit_the_problem(keys: dict[str, Any], shape: tuple[int, ...], is_float: bool) -> None:
    model = tiny(ViTForImageClassification, **keys)
    labels = random_labels(model, 4)
    assert tuple(labels.shape) == shape
    assert labels.is_floating_point() == is_float
    assert gradient_norms(model, inputs(model, 4)["pixel_values"]).norm > 0


def test_the_model_and_the_generator_are_left_as_they_were() -> None:
    model = tiny(ViTForImageClassification, hidden_dropout_prob=0.5).eval()
    state = torch.random.get_rng_state()
    pixels = inputs(model)["pixel_values"]
    first, second = gradient_norms(model, pixels), gradient_norms(model, pixels)
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_out_of_the_loss_are_told() -> None:
    model = tiny(ViTForImageClassification)
    block = model.vit.encoder.layers[0]
    block.mlp.fc1.weight.requires_grad_(False)
    found = gradient_norms(model, inputs(model)["pixel_values"])
    ((name, unused, weights),) = [(each.name, each.unused, each.weights) for each in found.layers if each.unused]
    assert (name, unused) == ("layers.0", 1)
    assert weights == pytest.approx(math.hypot(*(float(each.detach().norm()) for each in block.parameters()))), (
        "all of them"
    )
    assert "1 of its parameters" in as_table(found)


def test_models_without_a_loss_are_refused() -> None:
    for model, rule in (
        (tiny(ViTModel), "ViTModel has no loss"),
        (tiny(ViTForImageClassification, num_labels=0), "num_labels=0"),
    ):
        pixels = torch.zeros(2, 3, 16, 16)
        with pytest.raises(ConfigError, match=rule):
            gradient_norms(model, pixels)
    with pytest.raises(ConfigError, match="labels: ViTMAEForPreTraining takes none"):
        gradient_norms(tiny(ViTMAEForPreTraining), torch.zeros(2, 3, 16, 16), torch.zeros(2))


def test_gradients_become_a_png_and_a_table(tmp_path: Path) -> None:
    model = tiny(ViTForMaskedImageModeling)
    found = gradient_norms(model, inputs(model)["pixel_values"])
    draw(found, tmp_path / "figures" / "gradients.png", "a model")
    with Image.open(tmp_path / "figures" / "gradients.png") as picture:
        assert picture.format == "PNG"
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x1F, 0x5F, 0xA8), (0xB4, 0x55, 0x1E), (0x8A, 0x8A, 0x8A)} <= colours  # attention, MLP, the rest
    lines = as_table(found).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [layer.name for layer in found.layers]
    assert lines[-1].startswith(f"loss {found.loss:.4g}")


def test_a_gradient_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    model = tiny(ViTForImageClassification)
    with torch.no_grad():
        model.vit.layernorm.weight[0] = float("inf")
    found = gradient_norms(model, inputs(model)["pixel_values"])
    assert "not finite" in as_table(found)
    draw(found, tmp_path / "gradients.png")
    assert (tmp_path / "gradients.png").stat().st_size > 1000
