"""The batched operations of an augmentation, each in two halves: drawn on the host, applied on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vitscale import rng
from vitscale.augment import geometry
from vitscale.augment.resample import plan, resample

Drawn = Mapping[str, np.ndarray]  # an operation's parameters, by their names


class RaggedBatch(Protocol):
    """What operations read of a batch: see data/batch.py."""

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
    def labels(self) -> np.ndarray: ...
    @property
    def sample_keys(self) -> np.ndarray: ...


@dataclass(frozen=True)
class ModelInputs:
    """A micro-batch for the model, on its device."""

    pixel_values: Tensor  # float32 [n, channels, height, width]; before CropResize the batch's bytes, uint8 [bytes]
    sample_key: Tensor  # int64 [n]
    labels: Tensor | None  # int64 [n], -1 where a sample has none, or float32 [n, classes] where they are mixed

    def inputs(self) -> dict[str, Tensor]:
        """The model's keyword arguments."""
        inputs = {"pixel_values": self.pixel_values, "sample_key": self.sample_key}
        return inputs if self.labels is None else inputs | {"labels": self.labels}


class Operation(Protocol):
    """One step of an augmentation, of a whole micro-batch at once."""

    def draw(self, batch: RaggedBatch) -> Drawn:
        """On the host: the parameters of every sample, hashed from its key."""

    def apply(self, inputs: ModelInputs, drawn: Drawn, on_device: Mapping[str, Tensor]) -> ModelInputs:
        """Apply the parameters `on_device`. `drawn` are the same parameters on the host, for what it decides
        (shapes, chunks) without reading from the device."""


@dataclass(frozen=True)
class CropResize:
    """Crop to the drawn box, flip, resize: from the batch's bytes to float32 [n, channels, *size] in [0, 255]."""

    size: tuple[int, int]  # (height, width)
    channels: int
    flip: float  # the share of samples that are mirrored left to right
    vertical_flip: float = 0.0  # and top to bottom

    def draw(self, batch: RaggedBatch) -> Drawn:
        assert batch.channels == self.channels, f"{batch.channels} channels in the batch, {self.channels} wanted"
        flips = np.stack([
            rng.uniform(batch.sample_keys, purpose, 1)[:, 0] < share
            for purpose, share in (("vertical_flip", self.vertical_flip), ("flip", self.flip))
        ])  # fmt: skip
        return plan(batch.offsets, batch.heights, batch.widths, self.channels, batch.boxes, flips, self.size)

    def apply(self, inputs: ModelInputs, drawn: Drawn, on_device: Mapping[str, Tensor]) -> ModelInputs:
        return replace(inputs, pixel_values=resample(inputs.pixel_values, self.channels, self.size, drawn, on_device))


@dataclass(frozen=True)
class Shift:
    """Moved by up to `most` pixels along both axes, the border mirrored: what the simple random crop of DeiT III (its
    datasets.py: resize, pad by 4, crop) adds to the crop itself."""

    most: int

    def draw(self, batch: RaggedBatch) -> Drawn:
        steps = np.floor(rng.uniform(batch.sample_keys, "shift", 2) * (2 * self.most + 1)).astype(np.int64) - self.most
        return {"rows": steps[:, 0].copy(), "columns": steps[:, 1].copy()}

    def apply(self, inputs: ModelInputs, drawn: Drawn, on_device: Mapping[str, Tensor]) -> ModelInputs:
        images = geometry.shift(inputs.pixel_values, on_device["rows"], on_device["columns"], self.most)
        return replace(inputs, pixel_values=images)


class QuarterTurns:
    """Square images turned by 0, 90, 180 or 270 degrees, each as likely: for pictures that have no upright."""

    def draw(self, batch: RaggedBatch) -> Drawn:
        return {"turns": np.floor(rng.uniform(batch.sample_keys, "quarter_turns", 1)[:, 0] * 4).astype(np.int64)}

    def apply(self, inputs: ModelInputs, drawn: Drawn, on_device: Mapping[str, Tensor]) -> ModelInputs:
        return replace(inputs, pixel_values=geometry.quarter_turns(inputs.pixel_values, on_device["turns"]))


@dataclass(frozen=True)
class Normalize:
    """(pixel / 255 - mean) / std, as one multiplication and one addition; both [channels, 1, 1] on the device."""

    scale: Tensor
    shift: Tensor

    @property
    def mean(self) -> Tensor:
        """[channels], of pixels in [0, 1]."""
        return (-self.shift / (255 * self.scale)).flatten()

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], channels: int, device: str) -> Normalize:
        """mean, std: one value, or one a channel, of pixels in [0, 1]."""
        means, stds = (
            torch.tensor(values, dtype=torch.float64).expand(channels).view(-1, 1, 1) for values in (mean, std)
        )
        return cls((1 / (255 * stds)).float().to(device), (-means / stds).float().to(device))

    def draw(self, batch: RaggedBatch) -> Drawn:
        return {}

    def apply(self, inputs: ModelInputs, drawn: Drawn, on_device: Mapping[str, Tensor]) -> ModelInputs:
        pixels = inputs.pixel_values  # in place: on a CPU the faults of new pages cost three times the arithmetic
        return replace(inputs, pixel_values=torch.addcmul(self.shift, pixels, self.scale, out=pixels))
