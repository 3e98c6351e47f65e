from __future__ import annotations

import math

import torch

from vitscale.models.positions import interpolate_positions, of_patches, rotary_positions, rotate, sincos_table


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


def test_positions_without_a_class_token() -> None:
    table = sincos_table(8, (3, 5), prefix=0)
    assert torch.equal(table, sincos_table(8, (3, 5))[:, 1:])
    wide = interpolate_positions(table, (3, 5), (6, 2))
    assert wide.shape == (1, 12, 8)
    assert torch.equal(wide, interpolate_positions(sincos_table(8, (3, 5)), (3, 5), (6, 2))[:, 1:])


def test_rotations_tell_where_a_patch_is_whatever_the_grid() -> None:
    """A score of two rotated tokens depends on their distance alone; coordinates are shares of the image."""
    cos, sin = rotary_positions((4, 6), 8, 100.0, torch.device("cpu"))
    assert cos.shape == sin.shape == (1, 1, 24, 8)
    assert torch.allclose(cos**2 + sin**2, torch.ones(()))
    query, key = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 24, 8).unbind(0)
    scores = (rotate(query, (cos, sin)) @ rotate(key, (cos, sin)).transpose(2, 3))[0, 0].view(4, 6, 4, 6)
    assert torch.allclose(scores[0, 0, 1, 2], scores[2, 3, 3, 5], atol=1e-5)
    assert torch.allclose(scores[1, 4, 0, 1], scores[3, 5, 2, 2], atol=1e-5)
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1], atol=1e-3)
    # The middle patch of 3 x 3 lies where the middle of 5 x 5 does.
    fine = rotary_positions((5, 5), 8, 100.0, torch.device("cpu"))
    coarse = rotary_positions((3, 3), 8, 100.0, torch.device("cpu"))
    assert torch.allclose(fine[1][0, 0, 12], coarse[1][0, 0, 4], atol=1e-6)
    kept = of_patches((cos, sin), torch.tensor([[5, 0], [7, 7]]))
    assert torch.equal(kept[0][:, 0], cos[0, 0][torch.tensor([[5, 0], [7, 7]])])


def test_prefix_tokens_are_not_turned() -> None:
    rotary = rotary_positions((2, 2), 4, 100.0, torch.device("cpu"))
    x = torch.randn(2, 3, 2 + 4, 4)
    assert torch.equal(rotate(x, rotary)[:, :, :2], x[:, :, :2])
    assert not torch.allclose(rotate(x, rotary)[:, :, 2:], x[:, :, 2:], atol=1e-2)
