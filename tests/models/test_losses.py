"""Losses by problem type, number by number those of transformers; a user's own instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from tests.models.shapes import TINY, inputs, tiny
from vitscale.errors import DataError
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.losses import classification_loss, masked_l1, problem_type
from vitscale.models.multitask import ViTForMultitaskPreTraining

N = 6
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
CASES = [
    (5, None, torch.arange(N) % 5, SINGLE),
    (5, None, (torch.arange(N) % 5).int(), SINGLE),
    (5, None, (torch.arange(N * 5).view(N, 5) % 2).float(), MULTI),
    (1, None, torch.linspace(-2, 3, N), REGRESSION),
    (1, None, torch.linspace(-2, 3, N)[:, None], REGRESSION),
    (2, SINGLE, torch.arange(N) % 2, SINGLE),
    (5, REGRESSION, torch.linspace(-2, 3, N * 5).view(N, 5), REGRESSION),
    (5, MULTI, torch.full((N, 5), 0.3), MULTI),
]


@pytest.mark.parametrize(("num_labels", "written", "labels", "kind"), CASES)
def test_loss_is_that_of_transformers(num_labels: int, written: str | None, labels: Tensor, kind: str) -> None:
    model = tiny(ViTForImageClassification, num_labels=num_labels, problem_type=written)
    pixels = inputs(model)["pixel_values"]
    output = model(pixels, labels)
    theirs = transformers.ViTConfig(num_labels=num_labels, problem_type=written)
    given = labels.long() if kind == SINGLE else labels  # whose cross-entropy takes no int32
    expected = ForSequenceClassificationLoss(given, output.logits, theirs)
    assert theirs.problem_type in (kind, None)
    assert torch.allclose(output.loss, expected, rtol=1e-6)
    output.loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    assert problem_type(model.config, labels) == kind
    assert set(output.metrics) == ({"accuracy"} if kind == SINGLE else set())


def test_whole_numbers_may_be_quantities() -> None:
    """As a shard's labels are: int64."""
    config = ViTConfig(num_labels=1)
    loss = classification_loss(config, torch.tensor([[1.5], [4.0]]), torch.tensor([1, 2]))
    assert loss == (0.25 + 4) / 2


@pytest.mark.parametrize(("keys", "shape", "told"), [
    ({"num_labels": 5}, (N, 1), r"\(6, 1\): must be \(6,\) for single_label"),
    ({"num_labels": 5}, (N - 1,), r"\(5,\): must be \(6,\) for single_label"),
    ({"num_labels": 5, "problem_type": MULTI}, (N,), r"must be \(6, 5\) for multi_label"),
    ({"num_labels": 5, "problem_type": REGRESSION}, (N,), r"must be \(6, 5\) for regression"),
    ({"num_labels": 1}, (N, 2), r"must be \(6, 1\) or \(6,\) for regression"),
])  # fmt: skip
def test_labels_of_another_shape_are_told(keys: dict[str, Any], shape: tuple[int, ...], told: str) -> None:
    """transformers would broadcast some of them into a loss of nothing."""
    config = ViTConfig(**TINY, **keys)
    with pytest.raises(DataError, match=told):
        classification_loss(config, torch.zeros(N, config.num_labels), torch.zeros(shape, dtype=torch.int64))


def test_a_loss_of_ones_own() -> None:
    seen = []

    def focal(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((logits.dtype, labels))
        likely = logits.softmax(-1)[torch.arange(len(labels)), labels]
        return (-((1 - likely) ** 2) * likely.log()).mean()

    model = tiny(ViTForImageClassification).to(torch.bfloat16)
    batch = inputs(model)
    output = model(**batch, loss=focal)
    assert seen[0][0] is torch.float32
    assert seen[0][1] is batch["labels"]
    assert output.loss == focal(output.logits.float(), batch["labels"])
    assert "accuracy" in output.metrics
    output.loss.backward()
    # Labels that no problem type has are the loss's own affair.
    pairs = torch.randn(N, 5, 2)
    assert model(batch["pixel_values"], pairs, loss=lambda logits, labels: labels.sum()).loss == pairs.sum()
    assert model(batch["pixel_values"], loss=focal).loss is None  # without labels there is nothing to lose

    both = tiny(ViTForMultitaskPreTraining, classification_weight=0.5)
    batch = inputs(both) | {"labels": torch.tensor([1, -1, 0, -1, -1, 4])}
    output = both(**batch, loss=lambda logits, labels: (labels < 0).float().mean())
    assert output.metrics["classification_loss"] == 0.5  # absent ones are in what it is given
    assert torch.allclose(output.loss, output.metrics["mim_loss"] + 0.25)


def test_masked_l1_by_hand() -> None:
    """Two channels, patches of 2 x 4, one of four hidden: the mean over its 16 numbers."""
    pixels, reconstruction = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)
    reconstruction[0, :, 2:, 4:] = 3.0
    reconstruction[0, :, :2] = 100.0  # visible
    hidden = torch.tensor([[False, False, False, True]])
    assert masked_l1(pixels, reconstruction, hidden, (2, 4)).item() == pytest.approx(3.0, rel=1e-5)
