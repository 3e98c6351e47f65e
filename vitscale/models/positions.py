"""Where a patch is: learned position embeddings, fixed sines and cosines, or rotations of query and key."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]  # cosine and sine of each patch's angles


def sincos_table(width: int, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """MAE's fixed positions (util/pos_embed.py): float32 [1, prefix + rows * columns, width].

    The first half of the features tells the column, the second the row (MAE's order, which its
    weights rely on); the rows of `prefix` tokens (the cls token) are zero. `width` is a multiple of 4.
    """
    rows, columns = grid
    with torch.device("cpu"):  # for "meta" torch would import its compiler
        frequency = 1.0 / 10000.0 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns).outer(frequency)
        column = torch.arange(columns, dtype=torch.float64).repeat(rows).outer(frequency)
    patches = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return F.pad(patches, (0, 0, prefix, 0)).float()[None]


def interpolate_positions(
    positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool = False
) -> Tensor:
    """Positions [1, prefix + patches, width] of `grid` for `new_grid`: bicubic, as DINO and transformers do."""
    # While a graph for any image size is traced the sides are symbols, which must not be compared.
    if all(isinstance(side, int) for side in new_grid) and grid == new_grid:
        return positions
    prefix = positions.shape[1] - grid[0] * grid[1]
    front, patches = positions[:, :prefix], positions[:, prefix:]
    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([front, patches.permute(0, 2, 3, 1).flatten(1, 2).to(front.dtype)], dim=1)


def rotary_positions(grid: tuple[int, int], width: int, theta: float, device: torch.device) -> Rotary:
    """DINOv3's rotary positions (arXiv 2508.10104): float32 [1, 1, rows * columns, width], cosine and sine.

    A patch's centre is at (y, x) in [-1, 1] of the image whatever its size; frequency i of width / 4
    is 2 pi / theta ** (4 i / width). `width`: of a head, a multiple of 4.
    """
    rows, columns = grid
    y = (torch.arange(rows, dtype=torch.float32, device=device) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns, dtype=torch.float32, device=device) + 0.5) / columns * 2 - 1
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    exponent = torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4)
    angles = (2 * math.pi * centres[:, :, None] / theta**exponent).flatten(1).tile(2)[None, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """`x`: [n, heads, tokens, width] of queries or keys; its last tokens, which are patches, are turned."""
    cos, sin = (part.to(x.dtype) for part in rotary)
    prefix = x.shape[2] - cos.shape[2]
    front, patches = x[:, :, :prefix], x[:, :, prefix:]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([front, turned], dim=2)


def of_patches(rotary: Rotary, ids_keep: Tensor) -> Rotary:
    """The rotary positions of the patches `ids_keep` [n, kept] alone: [n, 1, kept, width]."""
    cos, sin = (part[0, 0][ids_keep][:, None] for part in rotary)
    return cos, sin


class Positioned(nn.Module):
    """A module that owns position embeddings: a parameter, or a table that is no part of its state.

    The table is recomputed rather than saved, by `fill_fixed_positions`, wherever a module's memory
    is newly made (initialization, loading).
    """

    positions_name: str
    positions_width: int
    positions_grid: tuple[int, int]
    positions_prefix: int

    def make_positions(self, name: str, kind: str, width: int, grid: tuple[int, int], prefix: int) -> None:
        """Register `name` as [1, prefix + rows * columns, width]; `kind`: "learned", "sincos" or "none" (None).

        `prefix`: 1 where there is a class token, which has a position too, else 0.
        """
        self.positions_name, self.positions_width, self.positions_grid = name, width, grid
        self.positions_prefix = prefix
        if kind == "learned":
            self.register_parameter(name, nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1], width)))
        else:
            table = sincos_table(width, grid, prefix) if kind == "sincos" else None
            self.register_buffer(
                name, table if table is None else table.to(torch.get_default_device()), persistent=False
            )

    def fixed_table(self) -> Tensor | None:
        """The table computed anew, on the CPU; None where positions are learned, or none."""
        if self._buffers.get(self.positions_name) is None:
            return None
        return sincos_table(self.positions_width, self.positions_grid, self.positions_prefix)


def fixed_positions(model: nn.Module) -> dict[str, Tensor]:
    """Every fixed table of `model` by its buffer's name, computed anew on the CPU."""
    owners = {prefix: module for prefix, module in model.named_modules() if isinstance(module, Positioned)}
    tables = {f"{prefix}.{module.positions_name}": module.fixed_table() for prefix, module in owners.items()}
    return {name: table for name, table in tables.items() if table is not None}


@torch.no_grad()
def fill_fixed_positions(model: nn.Module) -> None:
    """Put every fixed table into its buffer."""
    buffers = dict(model.named_buffers())
    for name, table in fixed_positions(model).items():
        buffers[name].copy_(table)


def is_table(found: Tensor, table: Tensor) -> bool:
    """Whether positions are this fixed table, whole or as half precision leaves it."""
    found = found.float()
    if found.shape != table.shape:
        return False
    return torch.allclose(found, table, atol=1e-5) or any(
        torch.equal(found, found.to(dtype).float())
        and torch.allclose(found, table.to(dtype).float(), torch.finfo(dtype).eps, 1e-5)
        for dtype in (torch.float16, torch.bfloat16)
    )
