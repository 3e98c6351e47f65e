"""Random erasing, and images mixed with their neighbours: mixup and cutmix. Of normalized images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vitscale import rng
from vitscale.augment.operations import Drawn, ModelInputs, RaggedBatch

_ATTEMPTS = 10
_AREA, _ASPECT = (0.02, 1 / 3), (math.log(0.3), math.log(1 / 0.3))  # timm's and torchvision's
_TABLE = 4096  # intervals of the quantiles of a beta distribution


@dataclass(frozen=True)
class Erase:
    """Normal noise in a box (Zhong et al. 2017, arXiv 1708.04896), as timm's RandomErasing(mode="pixel")."""

    probability: float
    size: tuple[int, int]  # (height, width) of the images

    def draw(self, batch: RaggedBatch) -> Drawn:
        """The images that get a box, their boxes (top, left, bottom, right) int64 [k, 4], and keys for the noise."""
        keys = batch.sample_keys
        draws = rng.uniform(keys, "erase", 2 * _ATTEMPTS + 3)
        height, width = self.size
        area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[:, :_ATTEMPTS])
        aspect = np.exp(_ASPECT[0] + (_ASPECT[1] - _ASPECT[0]) * draws[:, _ATTEMPTS : 2 * _ATTEMPTS])
        tall, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (tall < height) & (wide < width)
        rows, first = np.arange(len(keys)), fits.argmax(axis=1)
        tall, wide = tall[rows, first], wide[rows, first]
        top = np.floor(draws[:, -2] * (height - tall + 1))
        left = np.floor(draws[:, -1] * (width - wide + 1))
        images = np.flatnonzero(fits.any(axis=1) & (draws[:, -3] < self.probability))
        boxes = np.stack([top, left, top + tall, left + wide], axis=1)[images].astype(np.int64)
        return {"images": images, "boxes": boxes, "keys": keys[images]} if len(images) else {}

    def apply(self, inputs: ModelInputs, drawn: Drawn, on_device: Mapping[str, Tensor]) -> ModelInputs:
        if not drawn:
            return inputs
        images = inputs.pixel_values
        chosen, boxes = images.index_select(0, on_device["images"]), on_device["boxes"]
        channels, (height, width) = images.shape[1], self.size
        sides = drawn["boxes"][:, 2:] - drawn["boxes"][:, :2]
        noise = _normal(on_device["keys"], channels * int(sides.prod(axis=1).max()))
        # A pixel's number in its box, row by row; outside, where it is not looked at, any that there is.
        top, left, _, right = boxes[..., None, None].unbind(1)
        y = torch.arange(height, device=images.device)[:, None]
        x = torch.arange(width, device=images.device)
        number = ((y - top) * (right - left) + x - left).clamp(0, noise.shape[1] // channels - 1)
        number = number.view(len(boxes), 1, -1).expand(-1, channels, -1)
        spread = noise.unflatten(1, (-1, channels)).transpose(1, 2).gather(2, number)
        erased = torch.where(_within(boxes, self.size), spread.view_as(chosen), chosen)
        return replace(inputs, pixel_values=images.index_copy(0, on_device["images"], erased))


@dataclass(frozen=True)
class Mix:
    """Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899) of each pair of neighbours, with their labels.

    The partner of slot s is slot s xor 1 and both have the same share, as in timm's Mixup(mode="pair"); which of the
    two, the share and the box are hashed from both keys. Labels become float32 [n, num_labels].
    """

    mixup: float  # the parameters of the beta distributions that the first image's share is drawn from; 0: not this one
    cutmix: float
    probability: float  # that a pair is mixed at all
    switch: float  # that it is cut, where both are on
    size: tuple[int, int]  # (height, width) of the images
    num_labels: int

    def draw(self, batch: RaggedBatch) -> Drawn:
        """A pair's share float32 [n], and the box that is its partner's, int64 [n, 4]; empty where they are blended."""
        keys = batch.sample_keys
        assert len(keys) % 2 == 0, "config/check.py refuses an odd micro-batch"
        draws = rng.uniform(rng.fold(keys[0::2], keys[1::2]), "mix", 5)
        cuts = draws[:, 1] < (self.switch if self.mixup and self.cutmix else float(self.cutmix > 0))
        share = np.where(cuts, _beta(self.cutmix, draws[:, 2]), _beta(self.mixup, draws[:, 2]))
        share = np.where(draws[:, 0] < self.probability, share, 1.0)
        height, width = self.size
        side = np.sqrt(1 - share)
        tall, wide = np.floor(height * side), np.floor(width * side)
        middle_y, middle_x = np.floor(draws[:, 3] * height), np.floor(draws[:, 4] * width)
        top, bottom = (np.clip(middle_y + half, 0, height) for half in (-(tall // 2), (tall + 1) // 2))
        left, right = (np.clip(middle_x + half, 0, width) for half in (-(wide // 2), (wide + 1) // 2))
        boxes = np.stack([top, left, bottom, right], axis=1) * cuts[:, None]
        share = np.where(cuts, 1 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (height * width), share)
        return {
            "share": share.repeat(2).astype(np.float32),
            "blend": np.where(cuts, 1.0, share).repeat(2).astype(np.float32),
            "boxes": boxes.repeat(2, axis=0).astype(np.int64),
        }

    def apply(self, inputs: ModelInputs, drawn: Drawn, on_device: Mapping[str, Tensor]) -> ModelInputs:
        assert inputs.labels is not None, "config/check.py refuses mixing without labels"
        images, share = inputs.pixel_values, on_device["share"][:, None]
        partners = _partners(images)
        own = on_device["blend"].view(-1, 1, 1, 1)
        weights = torch.where(_within(on_device["boxes"], self.size), 0.0, own)
        labels = inputs.labels
        if not labels.is_floating_point():  # -1, no label, is a row of zeros
            labels = one_hot(labels.clamp(min=0), self.num_labels) * (labels >= 0)[:, None]
        labels = labels.float()
        return replace(
            inputs,
            pixel_values=torch.lerp(partners, images, weights),
            labels=torch.lerp(_partners(labels), labels, share),
        )


def _partners(tensor: Tensor) -> Tensor:
    """Row s xor 1 in the place of row s."""
    return tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _within(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """bool [n, 1, height, width]: whether a pixel lies in its image's box (top, left, bottom, right)."""
    top, left, bottom, right = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    y = torch.arange(size[0], device=boxes.device)[:, None]
    x = torch.arange(size[1], device=boxes.device)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def _normal(keys: Tensor, count: int) -> Tensor:
    """float32 [n, count], normal numbers of each key, by Box and Muller."""
    first, second = rng.uniform(keys, "noise", count + count % 2).unflatten(1, (-1, 2)).unbind(2)
    radius, angle = torch.sqrt(-2 * torch.log1p(-first)).float(), (2 * math.pi * second).float()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)[:, :count]


def _beta(parameter: float, draws: np.ndarray) -> np.ndarray:
    """Quantiles of the beta distribution with both parameters alike: float [n] in [0, 1] of uniform draws."""
    if not parameter:
        return np.ones_like(draws)
    # With v = x ** parameter the density below 1/2 is (1 - x) ** (parameter - 1), which is bounded.
    v = np.linspace(0, 0.5**parameter, _TABLE + 1)
    density = (1 - v ** (1 / parameter)) ** (parameter - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    below = np.interp(1 - np.abs(1 - 2 * draws), area / area[-1], v) ** (1 / parameter)
    return np.where(draws < 0.5, below, 1 - below)
