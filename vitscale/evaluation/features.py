"""Frozen features of labelled images, from an encoder or from the pixels themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.errors import ConfigError
from vitscale.models.vit import ViTModel

# [n, channels, height, width] normalised -> [n, features]
Encoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Features:
    """Features by encoder's name, each float32 [n, width], of samples in the order of their ids."""

    values: dict[str, np.ndarray]
    labels: np.ndarray  # int64 [n], -1 where a sample has none
    sample_ids: np.ndarray  # int64 [n]


@torch.inference_mode()
def extract(encoders: Mapping[str, Encoder], batches: Iterable[tuple[Tensor, np.ndarray, np.ndarray]]) -> Features:
    """Run every encoder over the same batches: (pixel_values on the device, labels, sample ids).

    Each sample counts once, by its id, however the batches were padded or repeated.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in encoders}
    labels, ids = [], []
    for pixel_values, batch_labels, batch_ids in batches:
        for name, encode in encoders.items():
            parts[name].append(encode(pixel_values).float().cpu().numpy().copy())
        labels.append(np.array(batch_labels))  # copies: whoever made the batch may use its memory again
        ids.append(np.array(batch_ids))
    assert ids, "no batches to take features of"
    sample_ids, first = np.unique(np.concatenate(ids), return_index=True)
    values = {name: np.concatenate(rows)[first] for name, rows in parts.items()}
    return Features(values, np.concatenate(labels)[first], sample_ids)


def pooled(vit: nn.Module, pool: str = "mean") -> Encoder:
    """The features of a ViTModel, in evaluation mode, with every patch visible.

    pool: "mean" of the patch tokens after the last norm, or "cls", the class token. Pretraining
    models have their encoder as `.vit`.
    """
    if pool not in ("mean", "cls"):
        raise ConfigError(f"pool={pool!r}: must be mean (of the patch tokens) or cls")
    assert isinstance(vit, ViTModel), type(vit)
    if pool == "cls" and not vit.config.use_cls_token:
        raise ConfigError("pool='cls': this model has no class token; set pool to mean")
    vit.eval()

    def encode(pixel_values: Tensor) -> Tensor:
        tokens = vit(pixel_values=pixel_values).last_hidden_state
        return tokens[:, 0] if pool == "cls" else vit.patch_tokens(tokens).mean(dim=1)

    return encode


def pixels(side: int = 32) -> Encoder:
    """The pixels themselves, averaged down to at most `side` x `side`: what an encoder has to beat."""

    def encode(pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[-2:]
        if max(height, width) > side:
            pixel_values = F.adaptive_avg_pool2d(pixel_values, (min(side, height), min(side, width)))
        return pixel_values.flatten(1)

    return encode


def standardize(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the mean and standard deviation of `train`; a constant feature stays at its distance."""
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    std[std < 1e-7 * max(1.0, float(np.abs(mean).max()))] = 1.0
    return ((train - mean) / std).astype(np.float32), ((test - mean) / std).astype(np.float32)
