"""Scores by hand, and beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics

from vitscale.config.check import scores_of_validation
from vitscale.config.schema import Model, Objective, RunConfig
from vitscale.evaluation.metrics import by_class, scores_of


def test_classes_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], np.float32))
    labels = np.array([0, 1, 1, 2])
    scores = scores_of("single_label_classification", logits, labels)
    assert scores["loss"] == pytest.approx(-np.log([0.7, 0.6, 0.3, 0.5]).mean(), rel=1e-6)
    assert scores["top1"] == 0.75
    assert scores["balanced_accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert "top5" not in scores, "of three classes"
    table = by_class(logits, labels, ["a", "b", "c"])
    assert table["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert table["classes"][1] == {
        "class": "b",
        "images": 2,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
    }


def test_classes_beside_scikit_learn() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 300)
    logits = random.normal(size=(300, 10)).astype(np.float32)
    logits[np.arange(300), labels] += 1
    scores = scores_of("single_label_classification", logits, labels)
    shares = softmax(logits.astype(np.float64), axis=1)
    assert scores["loss"] == pytest.approx(metrics.log_loss(labels, shares), rel=1e-6)
    assert scores["top5"] == pytest.approx(metrics.top_k_accuracy_score(labels, logits, k=5))
    assert scores["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, logits.argmax(1)))
    assert scores["auc"] == pytest.approx(metrics.roc_auc_score(labels, shares, multi_class="ovr"), abs=1e-6)
    absent = scores_of("single_label_classification", logits[labels < 9], labels[labels < 9])
    assert 0.5 < absent["auc"] < 1, "a class that is absent is left out"
    alone = scores_of("single_label_classification", logits[labels == 3], labels[labels == 3])
    assert "auc" not in alone
    assert alone["balanced_accuracy"] == alone["top1"]


def test_several_labels_and_numbers() -> None:
    random = np.random.default_rng(1)
    labels = (random.random((200, 4)) < 0.3).astype(np.float32)
    labels[:, 3] = 0
    logits = (random.normal(size=(200, 4)) + 2 * labels).astype(np.float32)
    scores = scores_of("multi_label_classification", logits, labels)
    assert scores["map"] == pytest.approx(
        metrics.average_precision_score(labels[:, :3], logits[:, :3], average="macro")
    )
    assert scores["auc"] == pytest.approx(metrics.roc_auc_score(labels[:, :3], logits[:, :3], average="macro"))
    values = random.normal(size=(50, 2)).astype(np.float32)
    scores = scores_of("regression", values + 0.5, values)
    assert scores["mse"] == pytest.approx(0.25, rel=1e-5)
    assert scores["mae"] == pytest.approx(0.5, rel=1e-5)
    assert scores["r2"] == pytest.approx(metrics.r2_score(values, values + 0.5))
    assert "r2" not in scores_of("regression", values[:1], values[:1])


@pytest.mark.parametrize(
    ("kind", "width", "labels"),
    [
        ("single_label_classification", 7, np.arange(30) % 7),
        ("single_label_classification", 3, np.arange(30) % 3),
        ("multi_label_classification", 3, (np.arange(90).reshape(30, 3) % 2).astype(np.float32)),
        ("regression", 2, np.arange(60, dtype=np.float32).reshape(30, 2)),
    ],
)
def test_the_config_knows_the_scores_by_name(kind: str, width: int, labels: np.ndarray) -> None:
    logits = np.random.default_rng(0).normal(size=(30, width)).astype(np.float32)
    config = RunConfig(model=Model(num_labels=width, problem_type=kind), objective=Objective(name="classification"))
    assert set(scores_of_validation(config)) == scores_of(kind, logits, labels).keys()


def test_several_labels_of_which_each_image_has_one_are_still_several() -> None:
    """The areas are of each label's own logits, whatever the others are; those of a class are of its share."""
    random = np.random.default_rng(0)
    logits, classes = random.normal(size=(80, 5)).astype(np.float32), random.integers(0, 5, 80)
    one_hot = np.eye(5, dtype=np.float32)[classes]
    scores = scores_of("multi_label_classification", logits, one_hot)
    assert scores["auc"] == pytest.approx(metrics.roc_auc_score(one_hot, logits, average="macro"), abs=1e-9)
    confident = logits * 60  # whose shares are 1 in float32
    shares = softmax(confident.astype(np.float64), axis=1)
    found = scores_of("single_label_classification", confident, classes)["auc"]
    assert found == pytest.approx(metrics.roc_auc_score(classes, shares, multi_class="ovr"), abs=1e-9)


def test_the_area_beside_scikit_learn_with_ties_and_at_the_size_of_imagenet() -> None:
    random = np.random.default_rng(2)
    logits = random.integers(-2, 3, (60, 3)).astype(np.float32)
    truth = (random.random((60, 3)) < 0.4).astype(np.float32)
    scores = scores_of("multi_label_classification", logits, truth)
    assert scores["auc"] == pytest.approx(metrics.roc_auc_score(truth, logits, average="macro"), abs=1e-12)
    labels = random.integers(0, 3, 21_000)  # of a thousand classes; those without an image are left out
    logits = np.zeros((21_000, 1000), np.float32)
    logits[:, :3] = random.normal(size=(21_000, 3)) + np.eye(3)[labels]
    exponentials = np.exp(logits[:, :3].astype(np.float64))
    shares = exponentials / (exponentials.sum(axis=1, keepdims=True) + 997)
    areas = [metrics.roc_auc_score(labels == each, shares[:, each]) for each in range(3)]
    scores = scores_of("single_label_classification", logits, labels)
    assert scores["auc"] == pytest.approx(np.mean(areas), abs=1e-9)
    logits[0, 1] = np.nan
    assert np.isnan(scores_of("single_label_classification", logits[:90], labels[:90])["auc"])
