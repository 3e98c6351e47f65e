"""Losses and metrics that several models share; all in float32 whatever the precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_l1(pixel_values: Tensor, reconstruction: Tensor, bool_masked_pos: Tensor, patch: int) -> Tensor:
    """SimMIM's loss: mean absolute error over the pixels and channels of hidden patches.

    `pixel_values`, `reconstruction`: [n, channels, height, width]; `bool_masked_pos`: [n, patches].
    """
    channels, height, width = pixel_values.shape[1:]
    hidden = bool_masked_pos.view(-1, height // patch, width // patch)
    hidden = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    error = (pixel_values.float() - reconstruction.float()).abs()
    return (error * hidden).sum() / (hidden.sum() + 1e-5) / channels


def label_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of int64 `labels` [n], summed over the labelled and divided by n.

    A label of -1 is absent. It is not divided by the number that are present, so that the mean over
    micro-batches and ranks does not depend on how the samples fell into them.
    """
    present = labels >= 0
    each = F.cross_entropy(logits.float(), labels.clamp(min=0), reduction="none", label_smoothing=label_smoothing)
    return torch.where(present, each, 0.0).sum() / len(labels)


def label_metrics(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`correct` and `labelled`, as shares of the micro-batch: their means over batches can be divided."""
    present = labels >= 0
    correct = present & (logits.detach().argmax(-1) == labels)
    return {"correct": correct.float().mean(), "labelled": present.float().mean()}
