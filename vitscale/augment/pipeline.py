"""What the drawn augmentation does to a batch: decoded bytes in, normalised pixels on the device out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vitscale import rng
from vitscale.augment.resample import Images, resample
from vitscale.config import schema


class RaggedBatch(Protocol):
    """What the pipeline reads of a batch: see data/batch.py."""

    @property
    def pixels(self) -> np.ndarray: ...
    @property
    def offsets(self) -> np.ndarray: ...
    @property
    def heights(self) -> np.ndarray: ...
    @property
    def widths(self) -> np.ndarray: ...
    @property
    def channels(self) -> int: ...
    @property
    def boxes(self) -> np.ndarray: ...
    @property
    def sample_keys(self) -> np.ndarray: ...


class Augment:
    """Crop to the drawn box, flip (in training), resize, normalise.

    Which samples are flipped is hashed from their sample keys, so it depends on nothing else.
    """

    def __init__(
        self, augment: schema.Augment, image_size: tuple[int, int], num_channels: int, device: str, train: bool
    ) -> None:
        self._size, self._channels, self._device = image_size, num_channels, device
        self._flip = augment.flip if train else 0.0
        mean, std = (torch.tensor(values, dtype=torch.float64).expand(num_channels).view(-1, 1, 1)
                     for values in (augment.mean, augment.std))  # fmt: skip
        # (x / 255 - mean) / std as one multiplication and one addition
        self._scale = (1 / (255 * std)).float().to(device)
        self._shift = (-mean / std).float().to(device)

    @torch.no_grad()
    def __call__(self, batch: RaggedBatch) -> Tensor:
        """float32 [n, channels, height, width] on the device: (pixel / 255 - mean) / std."""
        assert batch.channels == self._channels, f"{batch.channels} channels in the batch, {self._channels} wanted"
        images = Images(batch.pixels, batch.offsets, batch.heights, batch.widths, batch.channels)
        flips = rng.uniform(batch.sample_keys, "flip", 1)[:, 0] < self._flip
        resized = resample(images, batch.boxes, flips, self._size, self._device)
        return torch.addcmul(self._shift, resized, self._scale)
