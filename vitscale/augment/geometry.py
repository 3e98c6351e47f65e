"""Operations on where the pixels of images are. Pure functions of a batch and one number an image, as in pixels.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def affine(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """PIL.Image.transform(AFFINE, BICUBIC): [n, channels, height, width].

    matrix: [n, 2, 3], from an output pixel's place (x, y), pixel centres at .5, to its place in the image; fill:
    [channels], where that is outside. Pillow's numbers (Geometry.c: a cubic with a = -1, of pixels that are repeated
    beyond the border) before it cuts their fractions off.
    """
    n, channels, height, width = images.shape
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    horizontal, vertical = (row[:, 0] * x + row[:, 1] * y + row[:, 2] for row in matrix[..., None, None].unbind(1))
    inside = (horizontal >= 0) & (horizontal < width) & (vertical >= 0) & (vertical < height)  # [n, height, width]
    columns, rows = _cubic_taps(horizontal, width), _cubic_taps(vertical, height)
    flat, total = images.flatten(2), torch.zeros_like(images)
    for row, row_weight in rows:
        for column, column_weight in columns:
            place = (row * width + column).view(n, 1, -1).expand(-1, channels, -1)
            total.addcmul_(flat.gather(2, place).view_as(images), (row_weight * column_weight)[:, None])
    return torch.where(inside[:, None], total.clamp_(0, 255), fill.view(1, -1, 1, 1))


def shear_x(images: Tensor, value: Tensor, fill: Tensor) -> Tensor:
    """Rows moved left by `value` times their height in the image: timm's shear_x."""
    rows = torch.arange(images.shape[2], device=images.device) + 0.5
    return _slide(images, value[:, None] * rows, fill)


def shear_y(images: Tensor, value: Tensor, fill: Tensor) -> Tensor:
    """Columns moved up by `value` times their place: timm's shear_y."""
    return shear_x(images.transpose(2, 3), value, fill).transpose(2, 3)


def translate_x(images: Tensor, value: Tensor, fill: Tensor) -> Tensor:
    """Moved left by `value` times the width: timm's translate_x_rel."""
    return _slide(images, (value * images.shape[3])[:, None].expand(-1, images.shape[2]), fill)


def translate_y(images: Tensor, value: Tensor, fill: Tensor) -> Tensor:
    """Moved up by `value` times the height: timm's translate_y_rel."""
    return translate_x(images.transpose(2, 3), value, fill).transpose(2, 3)


def _slide(images: Tensor, offset: Tensor, fill: Tensor) -> Tensor:
    """Each row moved left by its own offset, [n, height]: what `affine` gives, from one axis."""
    width = images.shape[3]
    place = torch.arange(width, device=images.device) + 0.5 + offset[:, :, None]  # [n, height, width]
    total = torch.zeros_like(images)
    for pixel, weight in _cubic_taps(place, width):
        total.addcmul_(images.gather(3, pixel[:, None].expand_as(images)), weight[:, None])
    inside = ((place >= 0) & (place < width))[:, None]
    return torch.where(inside, total.clamp_(0, 255), fill.view(1, -1, 1, 1))


def rotate(images: Tensor, value: Tensor, fill: Tensor) -> Tensor:
    """Turned by `value` degrees against the clock, about the middle: PIL.Image.rotate."""
    angle = -torch.deg2rad(value)
    cos, sin = angle.cos(), angle.sin()
    middle_x, middle_y = images.shape[3] / 2, images.shape[2] / 2
    c = middle_x - cos * middle_x - sin * middle_y
    f = middle_y + sin * middle_x - cos * middle_y
    return affine(images, torch.stack([cos, sin, c, -sin, cos, f], dim=1).view(-1, 2, 3), fill)


def shift(images: Tensor, rows: Tensor, columns: Tensor, most: int) -> Tensor:
    """Moved up and left by whole pixels, int64 [n] in [-most, most]; beyond the border lies the mirror of what is
    within, as in torchvision's RandomCrop(padding=most, padding_mode="reflect")."""
    n, channels, height, width = images.shape
    padded = pad(images, (most, most, most, most), mode="reflect")
    y = torch.arange(height, device=images.device) + most + rows[:, None]  # [n, height]
    x = torch.arange(width, device=images.device) + most + columns[:, None]
    place = y[:, :, None] * (width + 2 * most) + x[:, None, :]
    return padded.flatten(2).gather(2, place.view(n, 1, -1).expand(-1, channels, -1)).view_as(images)


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Square images turned by `turns`, int64 [n] in 0 to 3, times 90 degrees against the clock: torch.rot90."""
    size = images.shape[3]
    y, x = torch.arange(size, device=images.device)[:, None], torch.arange(size, device=images.device)
    places = [
        y * size + x,
        x * size + (size - 1 - y),
        (size - 1 - y) * size + (size - 1 - x),
        (size - 1 - x) * size + y,
    ]
    place = torch.stack([each.flatten() for each in places])[turns]  # [n, pixels]
    return images.flatten(2).gather(2, place[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def _cubic_taps(place: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The four pixels around each place along an axis of `size`, and their weights."""
    first = torch.floor(place - 0.5)
    t = place - 0.5 - first
    weights = (-t * (1 - t) ** 2, 1 - 2 * t**2 + t**3, t * (1 + t - t**2), -(t**2) * (1 - t))
    pixels = [(first.long() + step).clamp(0, size - 1) for step in (-1, 0, 1, 2)]
    return list(zip(pixels, weights, strict=True))
