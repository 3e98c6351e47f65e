"""Pictures for the operations of an augmentation, as Pillow and as tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def pictures(count: int = 6, size: tuple[int, int] = (37, 45), channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth ones with sharp edges, and one of a single colour: whole numbers, float32 [n, channels, *size]."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        coarse = random.integers(0, 256, (5, 6, channels), dtype=np.uint8)
        bands = [Image.fromarray(coarse[..., band]).resize(size[::-1], 3) for band in range(channels)]
        whole = np.stack([np.asarray(band) for band in bands]).astype(np.float32)
        whole[:, 5 : 9 + number, 10:20] = random.integers(0, 256, (channels, 1, 1))
        made.append(np.clip(whole * (0.4 + 0.1 * number) + 10 * number, 0, 255).round())
    made[-1][:] = 77
    return torch.from_numpy(np.stack(made))


def as_pillow(image: torch.Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy().astype(np.uint8)
    return Image.fromarray(array if array.shape[2] == 3 else array[..., 0])


def as_tensor(image: Image.Image) -> torch.Tensor:
    array = np.asarray(image).astype(np.float32)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
