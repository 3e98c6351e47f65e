"""SimMIM, classification and both at once: their losses computed the long way."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models.shapes import inputs, tiny
from vitscale.errors import ConfigError, DataError
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling


def test_simmim_loss_is_the_mean_over_hidden_pixels() -> None:
    model = tiny(ViTForMaskedImageModeling, num_channels=2, image_size=(16, 24))
    batch = inputs(model)
    output = model(**batch)
    assert output.reconstruction.shape == batch["pixel_values"].shape
    errors = []
    for image, made, hidden in zip(batch["pixel_values"], output.reconstruction, output.bool_masked_pos, strict=True):
        for patch in hidden.nonzero().flatten().tolist():
            row, column = divmod(patch, 6)
            place = (slice(None), slice(row * 4, row * 4 + 4), slice(column * 4, column * 4 + 4))
            errors.append((image[place] - made[place]).abs().mean())
    assert len(errors) == 6 * 4 * 4  # of 2x3 cells, 4 of 4 patches each
    assert torch.allclose(output.loss, torch.stack(errors).mean(), rtol=1e-5)


def test_simmim_decoder_puts_each_token_into_its_patch() -> None:
    model = tiny(ViTForMaskedImageModeling, image_size=(16, 24))
    with torch.no_grad():
        tokens = torch.randn(1, 25, 16)
        images = model.decode(tokens, torch.empty(1, 3, 16, 24))
        tokens[:, 1 + 8] += 1  # row 1, column 2
        changed = (model.decode(tokens, torch.empty(1, 3, 16, 24)) != images).any(1)[0].nonzero()
    assert changed.min(0).values.tolist() == [4, 8]
    assert changed.max(0).values.tolist() == [7, 11]


def test_simmim_hides_what_it_is_to_predict() -> None:
    model = tiny(ViTForMaskedImageModeling)
    batch = inputs(model)
    output = model(**batch)
    hidden = output.bool_masked_pos.view(6, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(hidden, torch.randn_like(batch["pixel_values"]), batch["pixel_values"])
    assert torch.equal(model(**batch | {"pixel_values": other}).reconstruction, output.reconstruction)


@pytest.mark.parametrize("model_class", [ViTForMaskedImageModeling, ViTForMultitaskPreTraining])
def test_a_mask_must_be_given_in_training_only(model_class: type) -> None:
    model = tiny(model_class)
    batch = inputs(model)
    del batch["sample_key"]
    with pytest.raises(DataError, match="sample_key"):
        model(**batch)
    output = model.eval()(batch["pixel_values"])
    assert output.loss is None
    assert output.reconstruction.shape == batch["pixel_values"].shape


def test_stride_must_be_the_patch() -> None:
    with pytest.raises(ConfigError, match=r"encoder_stride=16: must be the .* patch_size=4"):
        tiny(ViTForMaskedImageModeling, encoder_stride=16)


def test_classification_loss_and_accuracy() -> None:
    model = tiny(ViTForImageClassification, label_smoothing=0.2)
    batch = inputs(model)
    output = model(**batch)
    logs = output.logits.log_softmax(-1)
    expected = -(0.8 * logs[torch.arange(6), batch["labels"]] + 0.2 * logs.mean(-1)).mean()
    assert torch.allclose(output.loss, expected, rtol=1e-5)
    answers = output.logits.argmax(-1)
    half = torch.where(torch.arange(6) < 3, answers, (answers + 1) % 5)
    assert model(batch["pixel_values"], half).metrics["accuracy"] == 0.5
    with pytest.raises(IndexError, match="-1"):  # an absent label is no class
        model(batch["pixel_values"], torch.full((6,), -1))


def test_features_where_there_are_no_labels() -> None:
    model = tiny(ViTForImageClassification, num_labels=0)
    output = model(torch.randn(6, 3, 16, 16))
    assert output.logits.shape == (6, 16)
    assert output.loss is None


def test_multitask_is_both_losses_on_one_forward() -> None:
    model = tiny(ViTForMultitaskPreTraining, mim_weight=2.0, classification_weight=0.5)
    batch = inputs(model)
    batch["labels"] = torch.tensor([1, -1, 0, -1, -1, 4])
    output = model(**batch)
    logs = output.logits.log_softmax(-1)
    classification = -(logs[0, 1] + logs[2, 0] + logs[5, 4]) / 6  # by the micro-batch, not by the labelled
    assert torch.allclose(output.metrics["classification_loss"], classification, rtol=1e-5)
    assert torch.allclose(output.loss, 2 * output.metrics["mim_loss"] + 0.5 * classification, rtol=1e-5)
    assert output.metrics["labelled"] == 0.5
    features = output.last_hidden_state  # which both heads saw
    assert torch.equal(model.classifier(features[:, 0]), output.logits)
    assert torch.equal(model.decode(features, batch["pixel_values"]), output.reconstruction)
    right = sum(int(output.logits[i].argmax() == label) for i, label in ((0, 1), (2, 0), (5, 4)))
    assert math.isclose(output.metrics["correct"].item(), right / 6, rel_tol=1e-6)
    assert not any(value.requires_grad for value in output.metrics.values())


def test_multitask_without_any_label_still_trains() -> None:
    model = tiny(ViTForMultitaskPreTraining)
    batch = inputs(model) | {"labels": torch.full((6,), -1)}
    output = model(**batch)
    assert torch.equal(output.loss, output.metrics["mim_loss"])
    output.loss.backward()
    assert (model.classifier.weight.grad == 0).all()
    del batch["labels"]
    with pytest.raises(DataError, match="labels"):
        model(**batch)
