"""Losses and metrics that several models share; all in float32 whatever the precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.errors import DataError
from vitscale.models.configuration import ViTConfig

# A user's own loss: (logits in float32, labels as given) -> one number.
Loss = Callable[[Tensor, Tensor], Tensor]


def patchify(pixel_values: Tensor, patch: tuple[int, int]) -> Tensor:
    """[n, channels, height, width] to [n, patches, patch values]: pixel by pixel, channels last; `patch`: (height,
    width) of one."""
    n, channels, height, width = pixel_values.shape
    p, q = patch
    x = pixel_values.reshape(n, channels, height // p, p, width // q, q)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * q * channels)  # nchpwq -> nhwpqc


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased) standard deviation of each patch: [n, patches, 1] each."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_mse(pixel_values: Tensor, logits: Tensor, mask: Tensor, patch: tuple[int, int], normalized: bool) -> Tensor:
    """MAE's loss: mean squared error over the values of hidden patches.

    `logits`: [n, patches, patch values], as `patchify` orders them; `mask`: [n, patches], 1 where hidden;
    `normalized`: each patch's values by their own mean and deviation.
    """
    target = patchify(pixel_values.float(), patch)
    if normalized:
        mean, scale = patch_statistics(target)
        target = (target - mean) / scale
    error = ((logits.float() - target) ** 2).mean(dim=-1)  # [n, patches]
    return (error * mask).sum() / mask.sum()


def masked_l1(pixel_values: Tensor, reconstruction: Tensor, bool_masked_pos: Tensor, patch: tuple[int, int]) -> Tensor:
    """SimMIM's loss: mean absolute error over the pixels and channels of hidden patches.

    `pixel_values`, `reconstruction`: [n, channels, height, width]; `bool_masked_pos`: [n, patches];
    `patch`: (height, width) of one.
    """
    channels, height, width = pixel_values.shape[1:]
    hidden = bool_masked_pos.view(-1, height // patch[0], width // patch[1])
    hidden = hidden.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, None]
    error = (pixel_values.float() - reconstruction.float()).abs()
    return (error * hidden).sum() / (hidden.sum() + 1e-5) / channels


def problem_type(config: ViTConfig, labels: Tensor | None = None) -> str:
    """What is predicted: as the config says, else told from num_labels and the labels' type, as transformers does.

    labels: where there are none yet, they are taken to be whole numbers.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    whole = labels is None or labels.dtype in (torch.int64, torch.int32)
    return "single_label_classification" if whole else "multi_label_classification"


def classification_loss(config: ViTConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of `logits` [n, num_labels] by problem type.

    regression: mean squared error, `labels` like logits or, of one number, [n];
    single_label_classification: cross-entropy with config.label_smoothing, labels whole numbers [n] or,
    where the config says this problem_type, also probabilities [n, num_labels] in floating point;
    multi_label_classification: binary cross-entropy, labels like logits, each in [0, 1].
    Raises DataError for labels of another shape.
    """
    kind = problem_type(config, labels)
    if kind == "single_label_classification":
        _check_classes(logits, labels)
        targets = labels.float() if labels.is_floating_point() else labels.long()
        return F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
    n, classes = logits.shape
    shapes = [(n, classes), (n,)] if kind == "regression" and classes == 1 else [(n, classes)]
    if tuple(labels.shape) not in shapes:
        raise DataError(
            f"labels of shape {tuple(labels.shape)}: must be {' or '.join(str(shape) for shape in shapes)} for "
            f"{kind} of num_labels={classes}; problem_type of the config says which it is"
        )
    if kind == "regression":
        return F.mse_loss(logits.float().view(labels.shape), labels.float())
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def supervised_loss(config: ViTConfig, kind: str | None, class_weights: Sequence[float] | None) -> Loss:
    """The loss of a run that trains on labels: `classification_loss`, or what its config asks for beyond that.

    kind: "bce": a yes or no for each class, mixed images being both of theirs (DeiT III, its engine.py); class_weights:
    factors of the classes' losses. Divided by the number of images, whatever their weights, so that neither the
    micro-batch nor the ranks matter.
    """
    weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal weights
        if kind != "bce" and weights is None:
            return classification_loss(config, logits, labels)
        _check_classes(logits, labels)
        if weights is not None:
            weights = weights.to(logits.device)  # once: the host waits for that copy
        if kind == "bce":
            shares = labels if labels.is_floating_point() else F.one_hot(labels.long(), logits.shape[1])
            targets = (shares > 0).float() * (1 - config.label_smoothing) + config.label_smoothing / logits.shape[1]
            return F.binary_cross_entropy_with_logits(logits.float(), targets, weight=weights)
        targets = labels.float() if labels.is_floating_point() else labels.long()
        each = F.cross_entropy(
            logits.float(), targets, weight=weights, reduction="none", label_smoothing=config.label_smoothing
        )
        return each.sum() / len(labels)

    return loss


def are_classes(logits: Tensor, labels: Tensor) -> bool:
    """Whether `labels` are whole numbers [n] or, in floating point, probabilities like `logits`, [n, classes]."""
    return labels.shape == (logits.shape if labels.is_floating_point() else logits.shape[:1])


def _check_classes(logits: Tensor, labels: Tensor) -> None:
    if not are_classes(logits, labels):
        n, classes = logits.shape
        raise DataError(
            f"labels of shape {tuple(labels.shape)} and {labels.dtype}: must be whole numbers ({n},) or, in floating "
            f"point, probabilities ({n}, {classes}) for single_label_classification; problem_type of the config says "
            "which it is"
        )


def label_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of `labels`, whole numbers [n] or probabilities [n, classes], summed and divided by n.

    A whole number of -1 is absent and adds nothing; with probabilities no sample is absent. It is not divided
    by the number that are present, so that the mean over micro-batches and ranks does not depend on how the
    samples fell into them. Raises DataError for labels of another shape.
    """
    _check_classes(logits, labels)
    if labels.is_floating_point():
        return F.cross_entropy(logits.float(), labels.float(), label_smoothing=label_smoothing)
    present, classes = labels >= 0, labels.long().clamp(min=0)
    each = F.cross_entropy(logits.float(), classes, reduction="none", label_smoothing=label_smoothing)
    return torch.where(present, each, 0.0).sum() / len(labels)


def label_metrics(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`correct` and `labelled`, as shares of the micro-batch: their means over batches can be divided.

    `labels` as in `label_cross_entropy`. With probabilities the likeliest class is the correct one, so that a
    run's rows have the same columns with mixed images; a mixed image's other class counts as wrong.
    """
    classes = labels.argmax(-1) if labels.is_floating_point() else labels
    present = classes >= 0
    correct = present & (logits.detach().argmax(-1) == classes)
    return {"correct": correct.float().mean(), "labelled": present.float().mean()}
