"""Where a patch is: learned position embeddings, or fixed sines and cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_table(width: int, grid: tuple[int, int]) -> Tensor:
    """MAE's fixed positions (util/pos_embed.py): float32 [1, 1 + rows * columns, width].

    The first half of the features tells the column, the second the row (MAE's order, which its
    weights rely on); the cls token's row is zero. `width` is a multiple of 4.
    """
    rows, columns = grid
    frequency = 1.0 / 10000.0 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns).outer(frequency)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows).outer(frequency)
    patches = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return F.pad(patches, (0, 0, 1, 0)).float()[None]


def interpolate_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Positions [1, 1 + patches, width] of `grid` for `new_grid`: bicubic, as DINO and transformers do."""
    if grid == new_grid:
        return positions
    cls, patches = positions[:, :1], positions[:, 1:]
    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, patches.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)


class Positioned(nn.Module):
    """A module that owns position embeddings: a parameter, or a table that is no part of its state.

    The table is recomputed rather than saved, by `fill_fixed_positions`, wherever a module's memory
    is newly made (initialization, loading).
    """

    positions_name: str
    positions_width: int
    positions_grid: tuple[int, int]

    def make_positions(self, name: str, kind: str, width: int, grid: tuple[int, int]) -> None:
        """Register `name` as [1, 1 + rows * columns, width]; `kind` is "learned" or "sincos"."""
        self.positions_name, self.positions_width, self.positions_grid = name, width, grid
        if kind == "learned":
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width)))
        else:
            self.register_buffer(name, sincos_table(width, grid), persistent=False)

    def fixed_table(self) -> Tensor | None:
        """The table computed anew, on the CPU; None where positions are learned."""
        if self.positions_name in self._parameters:
            return None
        return sincos_table(self.positions_width, self.positions_grid)


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
