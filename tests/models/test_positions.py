from __future__ import annotations

import math

import torch

from vitscale.models.positions import interpolate_positions, sincos_table


def test_table_is_maes_formula() -> None:
    """facebookresearch/mae util/pos_embed.py, number by number: first half columns, second half rows."""
    width, rows, columns = 12, 3, 5
    table = sincos_table(width, (rows, columns))
    assert table.shape == (1, 1 + rows * columns, width)
    assert (table[0, 0] == 0).all()
    for row in range(rows):
        for column in range(columns):
            expected = []
            for position in (column, row):
                angles = [position / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            found = table[0, 1 + row * columns + column]
            assert torch.allclose(found, torch.tensor(expected), atol=1e-7)


def test_interpolation_keeps_what_fits_and_meets_the_ends() -> None:
    table = sincos_table(8, (4, 4))
    assert interpolate_positions(table, (4, 4), (4, 4)) is table
    wide = interpolate_positions(table, (4, 4), (4, 8))
    assert wide.shape == (1, 33, 8)
    assert torch.equal(wide[:, 0], table[:, 0])
    # Rows are as before in every column, up to bicubic's overshoot at the borders.
    rows = wide[0, 1:].view(4, 8, 8)[:, 3, 4:]
    assert torch.allclose(rows, table[0, 1:].view(4, 4, 8)[:, 1, 4:], atol=0.02)
