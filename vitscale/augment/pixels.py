"""Operations on the values of images: colour, tone, sharpness. Pure functions of a batch and one number an image.

Images are float32 [n, channels, height, width] in [0, 255], and so is what comes back; the number is `value` [n].
Each does what Pillow's or torchvision's operation of its name does, without rounding to 8 bits: Pillow's result on
the rounded images is within two levels of 255 (tests/augment/test_pixels.py), unless the docstring says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L


def brightness(images: Tensor, value: Tensor) -> Tensor:
    """Times `value`: PIL.ImageEnhance.Brightness."""
    return (images * _by_image(value)).clamp(0, 255)


def contrast(images: Tensor, value: Tensor) -> Tensor:
    """Away from the image's mean grey by `value`: PIL.ImageEnhance.Contrast.

    Of other than 3 channels each has its own mean.
    """
    grey = _luma(images) if images.shape[1] == 3 else images
    return _blend(grey.mean(dim=(2, 3), keepdim=True).round(), images, value)


def saturation(images: Tensor, value: Tensor) -> Tensor:
    """Away from its grey picture by `value`: PIL.ImageEnhance.Color. RGB."""
    return _blend(_luma(images), images, value)


def greyscale(images: Tensor, value: Tensor) -> Tensor:
    """The grey picture in all three channels: torchvision's Grayscale(3); `value` is not used. RGB."""
    return _luma(images).expand_as(images)


def hue(images: Tensor, value: Tensor) -> Tensor:
    """Colours turned by `value`, a share of the circle: torchvision's adjust_hue of floating-point tensors. RGB."""
    red, green, blue = (images / 255).unbind(1)
    high, low = images.amax(1) / 255, images.amin(1) / 255
    spread = high - low
    safe = torch.where(spread == 0, 1.0, spread)
    turned = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    angle = torch.where(spread == 0, 0.0, turned / 6) + value[:, None, None]
    # Of HSV: a channel is high - spread * clamp(min(k, 4 - k), 0, 1) with k = (offset + 6 * angle) mod 6.
    offsets = torch.arange(5.0, 0.0, -2.0, device=images.device).view(1, 3, 1, 1)
    k = (offsets + 6 * angle[:, None]) % 6
    return 255 * (high[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def sharpness(images: Tensor, value: Tensor) -> Tensor:
    """Away from its smoothed picture by `value`: PIL.ImageEnhance.Sharpness, whose filter leaves the border alone."""
    if min(images.shape[2:]) < 3:
        return images
    smooth = images.clone()
    inner = smooth[:, :, 1:-1, 1:-1]
    height, width = inner.shape[2:]
    total = 4 * inner
    for down in range(3):
        for right in range(3):
            total = total + images[:, :, down : down + height, right : right + width]
    inner.copy_((total / 13).round())
    return _blend(smooth, images, value)


def invert(images: Tensor, value: Tensor) -> Tensor:
    """255 - x: PIL.ImageOps.invert; `value` is not used."""
    return 255 - images


def solarize(images: Tensor, value: Tensor) -> Tensor:
    """Inverted from the threshold `value` on: PIL.ImageOps.solarize."""
    return torch.where(images.round() < _by_image(value), images, 255 - images)


def solarize_add(images: Tensor, value: Tensor) -> Tensor:
    """Brighter by `value` below 128: timm's solarize_add (data/auto_augment.py)."""
    return torch.where(images.round() < 128, (images + _by_image(value)).clamp(max=255), images)


def posterize(images: Tensor, value: Tensor) -> Tensor:
    """The `value` highest bits of 8, cut to whole ones: PIL.ImageOps.posterize; with 8 the images as they are."""
    step = torch.exp2(8 - _by_image(value).floor())
    return torch.where(step > 1, (images.round() / step).floor() * step, images)


def autocontrast(images: Tensor, value: Tensor) -> Tensor:
    """Every channel stretched to 0 and 255: PIL.ImageOps.autocontrast; `value` is not used."""
    low, high = images.amin(dim=(2, 3), keepdim=True).round(), images.amax(dim=(2, 3), keepdim=True).round()
    spread = high - low
    stretched = ((images - low) * (255 / spread.clamp(min=1))).clamp(0, 255)
    return torch.where(spread > 0, stretched, images)


def equalize(images: Tensor, value: Tensor) -> Tensor:
    """Every channel's histogram made even: PIL.ImageOps.equalize of the rounded image; `value` is not used."""
    levels = images.round().long().flatten(2)  # [n, channels, pixels]
    counts = torch.zeros((*levels.shape[:2], 256), dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    before = counts.cumsum(2) - counts
    last = levels.amax(2, keepdim=True)  # the brightest level's pixels are not counted
    step = before.gather(2, last) // 255
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(2, levels).view_as(images).to(images.dtype)
    return torch.where(step[..., None] > 0, equalized, images)


def blur(images: Tensor, value: Tensor, radius: int = 6) -> Tensor:
    """Gaussian blur of standard deviation `value`, in pixels; beyond the border lie its pixels again.

    radius: where the Gaussian is cut, 3 standard deviations or more. Pillow's GaussianBlur is an approximation of it
    by boxes: the results differ by up to 6 levels at sharp edges.
    """
    places = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (places / value[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)  # [n, taps]
    for dim, sides in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        size, padded = images.shape[dim], pad(images, sides, mode="replicate")
        total = torch.zeros_like(images)
        for tap in range(2 * radius + 1):
            total.addcmul_(padded.narrow(dim, tap, size), _by_image(weights[:, tap]))
        images = total
    return images


def _luma(images: Tensor) -> Tensor:
    """Grey of RGB: [n, 1, height, width]."""
    red, green, blue = images.split(1, dim=1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _blend(plain: Tensor, images: Tensor, value: Tensor) -> Tensor:
    """From `plain` (0) to the images (1) and beyond."""
    return (plain + _by_image(value) * (images - plain)).clamp(0, 255)


def _by_image(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)
