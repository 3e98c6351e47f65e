"""Losses by problem type, number by number those of transformers; a user's own instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from tests.augment.test_pipeline import Uploads
from tests.models.shapes import TINY, inputs, tiny
from vitscale import rng
from vitscale.augment.operations import Drawn, ModelInputs, RaggedBatch
from vitscale.augment.pipeline import Augment
from vitscale.config.schema import Model, Objective, RunConfig, Train
from vitscale.errors import DataError
from vitscale.models.auto import new_model
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.losses import (
    classification_loss,
    label_cross_entropy,
    label_metrics,
    masked_l1,
    problem_type,
    supervised_loss,
)
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
    ({"num_labels": 5}, (N, 1), r"\(6, 1\) and torch.int64: must be whole numbers \(6,\) or, .* for single_label"),
    ({"num_labels": 5}, (N - 1,), r"\(5,\) and .*: must be whole numbers \(6,\) or, .* for single_label"),
    ({"num_labels": 5, "problem_type": MULTI}, (N,), r"must be \(6, 5\) for multi_label"),
    ({"num_labels": 5, "problem_type": REGRESSION}, (N,), r"must be \(6, 5\) for regression"),
    ({"num_labels": 1}, (N, 2), r"must be \(6, 1\) or \(6,\) for regression"),
    ({"num_labels": 5, "problem_type": SINGLE}, (N, 5), r"\(6, 5\) and torch.int64: .* probabilities \(6, 5\)"),
])  # fmt: skip
def test_labels_of_another_shape_are_told(keys: dict[str, Any], shape: tuple[int, ...], told: str) -> None:
    """transformers would broadcast some of them into a loss of nothing."""
    config = ViTConfig(**TINY, **keys)
    with pytest.raises(DataError, match=told):
        classification_loss(config, torch.zeros(N, config.num_labels), torch.zeros(shape, dtype=torch.int64))


def soft_labels() -> Tensor:
    """Two classes a sample, float32 [N, 5], the first with a share of 0.75."""
    classes = torch.arange(N)
    return 0.75 * F.one_hot(classes % 5, 5).float() + 0.25 * F.one_hot((classes + 2) % 5, 5).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_labels_by_hand(smoothing: float, dtype: torch.dtype) -> None:
    config = ViTConfig(num_labels=5, problem_type=SINGLE, label_smoothing=smoothing)
    logits, labels = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)), soft_labels()
    expected = -((1 - smoothing) * labels + smoothing / 5).mul(logits.log_softmax(-1)).sum(-1).mean()
    ours = classification_loss(config, logits, labels.to(dtype))
    assert torch.equal(ours, F.cross_entropy(logits, labels, label_smoothing=smoothing))
    assert torch.allclose(ours, expected, rtol=1e-6)
    assert torch.equal(label_cross_entropy(logits, labels.to(dtype), smoothing), ours)
    unsaid = ViTConfig(num_labels=5, label_smoothing=smoothing)  # told from the labels, as transformers does
    assert classification_loss(unsaid, logits, labels) == F.binary_cross_entropy_with_logits(logits, labels)


def test_soft_labels_of_one_class_are_that_class() -> None:
    logits, classes = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 5
    one_hot = F.one_hot(classes, 5).float()
    for smoothing in (0.0, 0.1):
        hard, soft = (label_cross_entropy(logits, labels, smoothing) for labels in (classes, one_hot))
        assert torch.allclose(hard, soft, rtol=1e-6)
    assert label_metrics(logits, one_hot) == label_metrics(logits, classes)


def test_metrics_of_soft_labels_take_the_likeliest_class() -> None:
    logits = F.one_hot(torch.tensor([0, 1, 2, 0, 0, 2]), 5).float()  # three firsts, then 0, 0 (second: 1) and 2 (2)
    assert label_metrics(logits, soft_labels()) == {"correct": 0.5, "labelled": 1.0}
    model = tiny(ViTForImageClassification, problem_type=SINGLE)
    output = model(inputs(model)["pixel_values"], soft_labels())
    assert output.metrics["accuracy"] == label_metrics(output.logits, soft_labels())["correct"]
    unsaid = tiny(ViTForImageClassification)  # of many classes each: no single one is correct
    assert unsaid(inputs(unsaid)["pixel_values"], soft_labels()).metrics == {}


@pytest.mark.parametrize(("labels", "told"), [
    (torch.zeros(N, 4), r"\(6, 4\) and .*: must be whole numbers \(6,\) or, .* probabilities \(6, 5\)"),
    (torch.zeros(N), r"\(6,\) and torch.float32: must be whole numbers"),
    (torch.zeros(N - 1, dtype=torch.int64), r"\(5,\) and .*: must be whole numbers \(6,\)"),
])  # fmt: skip
def test_soft_labels_of_another_shape_are_told(labels: Tensor, told: str) -> None:
    logits = torch.zeros(N, 5)
    with pytest.raises(DataError, match=told):
        label_cross_entropy(logits, labels, 0.0)
    with pytest.raises(DataError, match=told):
        classification_loss(ViTConfig(num_labels=5, problem_type=SINGLE), logits, labels)


@dataclass(frozen=True)
class MixPairs:
    """The smallest mixup: sample s has 0.75 of its own and 0.25 of sample s xor 1."""

    classes: int

    def draw(self, batch: RaggedBatch) -> Drawn:
        return {"partner": np.arange(len(batch.sample_keys)) ^ 1}

    def apply(self, inputs: ModelInputs, drawn: Drawn, on_device: Mapping[str, Tensor]) -> ModelInputs:
        pixels, labels = inputs.pixel_values, F.one_hot(inputs.labels, self.classes).float()
        mixed = (each.lerp(each[on_device["partner"]], 0.25) for each in (pixels, labels))
        return ModelInputs(next(mixed), inputs.sample_key, next(mixed))


@pytest.mark.parametrize("objective", ["classification", "multitask"])
def test_labels_mixed_by_an_operation_arrive_in_the_loss(objective: str) -> None:
    """As mixup will: a run's augmentation with one operation more, and the run's model as it is."""
    count = 4
    config = RunConfig(
        model=Model(**TINY, num_labels=5, num_channels=3), objective=Objective(objective), train=Train(steps=1)
    )
    augment = Augment.of(config, "cpu", train=True)
    augment.operations.append(MixPairs(5))
    batch = SimpleNamespace(
        pixels=np.repeat(np.array([0, 255, 40, 160], np.uint8), 16 * 16 * 3),  # unlike, as their logits must be
        offsets=np.arange(count) * 16 * 16 * 3,
        heights=np.full(count, 16, np.int32),
        widths=np.full(count, 16, np.int32),
        channels=3,
        boxes=np.tile(np.array([[0, 0, 16, 16]], np.float32), (count, 1)),
        labels=np.array([1, 4, 0, 2]),
        sample_keys=rng.sample_key(0, 0, np.arange(count)),
    )
    model = new_model(config, seed=0)
    model.classifier.weight.data *= 100  # else all classes are about as likely, and mixing changes little
    output = model(**augment(batch).inputs())
    own, partner = (F.cross_entropy(output.logits, torch.tensor(each)) for each in ([1, 4, 0, 2], [4, 1, 2, 0]))
    told = output.loss if objective == "classification" else output.metrics["classification_loss"]
    assert torch.allclose(told, 0.75 * own + 0.25 * partner, rtol=1e-5)
    assert not torch.allclose(told, own, rtol=1e-3)
    assert output.metrics.keys() >= ({"accuracy"} if objective == "classification" else {"correct", "labelled"})


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


def test_class_weights_go_to_the_device_once() -> None:
    """Not with every step: the host waits for such a copy."""
    loss = supervised_loss(ViTConfig(num_labels=3, problem_type="single_label_classification"), None, [1.0, 2.0, 3.0])
    logits, labels = torch.zeros(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with Uploads() as first:
        loss(logits, labels)
    with Uploads() as second:
        loss(logits, labels)
    assert (first.count, second.count) == (1, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_beside_torch(smoothing: float) -> None:
    """Of whole numbers and of mixed images; divided by the images, where torch's mean divides by their weights."""
    weights, n = [0.5, 2.0, 0.0, 1.5], 6
    config = ViTConfig(num_labels=4, problem_type="single_label_classification", label_smoothing=smoothing)
    torch.manual_seed(0)
    logits, labels = torch.randn(n, 4), torch.tensor([0, 1, 2, 3, 1, 1])
    mixed = 0.7 * F.one_hot(labels, 4) + 0.3 * F.one_hot(labels.flip(0), 4)
    ce, bce = (supervised_loss(config, kind, weights) for kind in ("ce", "bce"))
    summed = torch.nn.CrossEntropyLoss(torch.tensor(weights), reduction="sum", label_smoothing=smoothing)
    for each in (labels, mixed):
        assert torch.allclose(ce(logits, each), summed(logits, each) / n)
        yes = F.one_hot(labels, 4) > 0 if each is labels else each > 0
        expected = torch.nn.BCEWithLogitsLoss(torch.tensor(weights))(logits, yes * (1 - smoothing) + smoothing / 4)
        assert torch.allclose(bce(logits, each), expected)
    if not smoothing:
        by_hand = [weights[label] * -logits[i].log_softmax(0)[label] for i, label in enumerate(labels.tolist())]
        assert ce(logits, labels).item() == pytest.approx(sum(map(float, by_hand)) / n, rel=1e-6)
    halves = [ce(part, own) for part, own in zip(logits.split(3), labels.split(3), strict=True)]
    assert torch.allclose(sum(halves) / 2, ce(logits, labels)), "as two ranks, or two micro-batches, have it"
