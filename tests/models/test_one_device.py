"""Models and losses as on a GPU: nothing of a step lies on the CPU, and the host waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.shapes import EVERY_OPTION, OPTION_SETS, TRAINABLE, inputs, tiny, tiny_keys
from tests.one_device import OneDevice
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.masking import cell_masking, mask_noise, random_masking
from vitscale.models.vit import ViTModel, ViTPreTrainedModel, drop_path_scales

META = torch.device("meta")


def on_meta(model_class: type[ViTPreTrainedModel], **keys: Any) -> tuple[ViTPreTrainedModel, dict[str, Any]]:
    """A model and its inputs, without values."""
    batch = {name: value.to(META) for name, value in inputs(tiny(model_class, **keys)).items()}
    with META:
        return model_class(model_class.config_class(**tiny_keys(model_class) | keys)), batch


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS.keys())
@pytest.mark.parametrize("model_class", TRAINABLE, ids=lambda c: c.__name__)
def test_a_training_step(model_class: type[ViTPreTrainedModel], options: dict[str, Any]) -> None:
    """Forward with masks, drop path, loss and metrics, and backward with blocks run again."""
    model, batch = on_meta(model_class, drop_path_rate=0.2, num_hidden_layers=2, **options)
    model.gradient_checkpointing_enable()
    with OneDevice() as mode:
        output = model(**batch)
        forward = mode.seen
        output.loss.backward()
    assert mode.seen > forward > 50
    assert all(value.device == META for value in (output.loss, *output.metrics.values()))
    assert all(parameter.grad.device == META for parameter in model.parameters())


@pytest.mark.parametrize("keys", [
    {"problem_type": "multi_label_classification"}, {"problem_type": "single_label_classification"},
    {"num_labels": 1}, {"label_smoothing": 0.1},
], ids=["multi_label", "soft", "regression", "smoothed"])  # fmt: skip
def test_other_losses(keys: dict[str, Any]) -> None:
    model, batch = on_meta(ViTForImageClassification, **keys)
    if "label_smoothing" not in keys:
        batch["labels"] = torch.zeros(6, model.config.num_labels, device=META)
    with OneDevice():
        model(**batch).loss.backward()


def test_standardized_targets() -> None:
    model, batch = on_meta(ViTMAEForPreTraining, norm_pix_loss=True)
    with OneDevice():
        model(**batch).loss.backward()


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "options"])
def test_inference_with_everything_asked_for(options: dict[str, Any]) -> None:
    model, batch = on_meta(ViTModel, **options)
    pixels = torch.zeros(2, 3, 24, 12, device=META)
    with OneDevice():
        model.eval()(**batch, output_attentions=True, output_hidden_states=True)
        model(pixels, interpolate_pos_encoding=True)


def test_masks_and_drop_path() -> None:
    keys = torch.zeros(6, dtype=torch.int64, device=META)
    with OneDevice() as mode:
        drawn = [*random_masking(mask_noise(keys, 16), 0.75), cell_masking(keys, (4, 4), 2, 0.6)]
        drawn.append(drop_path_scales(keys, 0.2, 3))
    assert mode.seen > 20
    assert all(tensor.device == META for tensor in drawn)
