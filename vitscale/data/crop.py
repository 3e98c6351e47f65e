"""Which part of an image is looked at: boxes drawn from sample keys and image sizes, before any decoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitscale import rng
from vitscale.config.augmentation import Augmentation

_ATTEMPTS = 10


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop (after Szegedy et al. 2015, arXiv 1409.4842), by hashed draws."""

    scale: tuple[float, float]  # share of the image's area
    ratio: tuple[float, float]  # width over height, drawn evenly in its logarithm

    def boxes(self, sample_keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """int64 [n, 4] (top, left, bottom, right) in pixels of images [heights, widths] int [n]."""
        heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
        draws = rng.uniform(sample_keys, "crop", 2 * _ATTEMPTS + 2)
        low, high = self.scale
        area = (heights * widths)[:, None] * (low + (high - low) * draws[:, :_ATTEMPTS])
        low, high = np.log(self.ratio)
        ratio = np.exp(low + (high - low) * draws[:, _ATTEMPTS : 2 * _ATTEMPTS])
        tall = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        wide = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        fits = (tall > 0) & (tall <= heights[:, None]) & (wide > 0) & (wide <= widths[:, None])
        rows, first = np.arange(len(fits)), fits.argmax(axis=1)
        found = fits[rows, first]
        # No attempt fits: the whole image, cut to the nearest allowed ratio, from its middle.
        nearest = np.clip(widths / heights, *self.ratio)
        tall = np.where(found, tall[rows, first], np.minimum(heights, np.rint(widths / nearest)).astype(np.int64))
        wide = np.where(found, wide[rows, first], np.minimum(widths, np.rint(heights * nearest)).astype(np.int64))
        tall, wide = np.maximum(tall, 1), np.maximum(wide, 1)
        top = np.where(found, draws[:, -2] * (heights - tall + 1), (heights - tall) // 2).astype(np.int64)
        left = np.where(found, draws[:, -1] * (widths - wide + 1), (widths - wide) // 2).astype(np.int64)
        return np.stack([top, left, top + tall, left + wide], axis=1)


@dataclass(frozen=True)
class SimpleCrop:
    """The largest box of an aspect, anywhere in the image: DeiT III's simple random crop, but for the few pixels that
    augment/operations.py's Shift adds on the device."""

    aspect: float = 1.0  # width over height of what the box is resized to

    def boxes(self, sample_keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """int64 [n, 4] (top, left, bottom, right) in pixels of images [heights, widths] int [n]."""
        top, left, bottom, right = CenterCrop(1.0, self.aspect).boxes(sample_keys, heights, widths).T
        draws = rng.uniform(sample_keys, "crop", 2)
        down = np.floor(draws[:, 0] * (heights - (bottom - top) + 1)).astype(np.int64) - top
        across = np.floor(draws[:, 1] * (widths - (right - left) + 1)).astype(np.int64) - left
        return np.stack([top + down, left + across, bottom + down, right + across], axis=1)


@dataclass(frozen=True)
class CenterCrop:
    """The middle of the image, for evaluation."""

    fraction: float  # of the largest box of that aspect, along each side
    aspect: float = 1.0  # width over height of what the box is resized to

    def boxes(self, sample_keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """int64 [n, 4] (top, left, bottom, right); the keys are not looked at."""
        heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
        largest = np.minimum(heights, widths / self.aspect)
        tall = np.clip(np.rint(self.fraction * largest), 1, heights).astype(np.int64)
        wide = np.clip(np.rint(self.fraction * largest * self.aspect), 1, widths).astype(np.int64)
        top, left = (heights - tall) // 2, (widths - wide) // 2
        return np.stack([top, left, top + tall, left + wide], axis=1)


Crop = RandomCrop | SimpleCrop | CenterCrop


def evaluation_crop(fraction: float, size: tuple[int, int]) -> CenterCrop:
    """evaluation.crop_fraction, as a processor of transformers does it: the shorter side resized to a whole number of
    pixels, then the middle of `size` (height, width)."""
    height, width = size
    return CenterCrop(height / round(height / fraction), width / height)


def training_crop(augment: Augmentation, size: tuple[int, int]) -> Crop:
    """What augment.crop asks for. size: (height, width) that boxes are resized to."""
    if augment.crop == "simple":
        return SimpleCrop(size[1] / size[0])
    return RandomCrop(augment.crop_scale, augment.crop_ratio)
