"""Which patches a sample hides: drawn from its key alone, the same number in every sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitscale import rng
from vitscale.errors import ConfigError, DataError

_MASK = rng.purpose_code("mask")


def mask_noise(sample_key: Tensor, count: int) -> Tensor:
    """float64 [n, count]: the noise whose order tells what is hidden."""
    return rng.uniform(sample_key, _MASK, count)


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Hide the patches of largest noise (He et al. 2022, arXiv 2111.06377, section 3).

    `noise`: [n, patches]. Gives ids_keep int64 [n, int(patches * (1 - mask_ratio))], the visible
    patches in the order of their noise; mask float32 [n, patches], 1 where hidden; and ids_restore
    int64 [n, patches], the place of each patch in that order.
    """
    kept = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = (ids_restore >= kept).float()
    return ids_shuffle[:, :kept], mask, ids_restore


def masked_cells(cells: int, mask_ratio: float) -> int:
    """How many of `cells` are hidden: rounded up, as SimMIM's MaskGenerator does."""
    count = math.ceil(cells * mask_ratio)
    if not 0 < count < cells:
        raise ConfigError(
            f"mask_ratio={mask_ratio}: would hide {count} of {cells} cells; it must hide at least one and leave one: "
            "take a smaller mask_patch or another mask_ratio"
        )
    return count


def cell_masking(sample_key: Tensor, grid: tuple[int, int], mask_patch: int, mask_ratio: float) -> Tensor:
    """Hide random square cells of `mask_patch` x `mask_patch` patches (Xie et al. 2022, arXiv 2111.09886).

    `grid`: patches along (height, width). Gives bool [n, patches], True where hidden.
    """
    rows, columns = grid[0] // mask_patch, grid[1] // mask_patch
    if (rows * mask_patch, columns * mask_patch) != tuple(grid):
        raise DataError(f"mask_patch={mask_patch}: must divide the {grid[0]}x{grid[1]} grid of patches")
    order = torch.argsort(mask_noise(sample_key, rows * columns), dim=1, stable=True)
    place = torch.argsort(order, dim=1)
    hidden = (place < masked_cells(rows * columns, mask_ratio)).view(-1, rows, columns)
    return hidden.repeat_interleave(mask_patch, 1).repeat_interleave(mask_patch, 2).flatten(1)
