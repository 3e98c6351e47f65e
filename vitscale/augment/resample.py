"""Crop, flip and antialiased bicubic resize of a ragged batch, as one weighted sum along each axis.

An output row is a weighted sum of a few input rows, an output column of a few input columns: crop,
flip and filter all lie in the weights. They are Pillow's (src/libImaging/Resample.c: bicubic with
a = -0.5, widened by the scale when shrinking, cut at the image's border and made to sum to 1), so
pixels around the box count where the image has them, as in `Image.resize(box=...)`. Unlike Pillow
nothing is rounded to 8 bits, in between or at the end.

The same weights are applied in one of two forms. "dense" scatters them into matrices and multiplies
whole padded batches: what a GPU wants. "banded" sums only the rows that have a weight: what a CPU
wants, and there an image's result has the same bits whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

SUPPORT = 2.0  # the bicubic kernel is 0 from here on
# Padded values held at once: an image or a few in a CPU's cache; 256 MiB of fp32, some 100 photographs, on a GPU.
CHUNK_VALUES = {"banded": 1 << 18, "dense": 1 << 26}


@dataclass(frozen=True)
class Images:
    """uint8 images of different sizes in one flat buffer: image i is HWC from offsets[i] on."""

    pixels: np.ndarray  # uint8 [bytes]
    offsets: np.ndarray  # int64 [n]
    heights: np.ndarray  # int [n]
    widths: np.ndarray  # int [n]
    channels: int


@dataclass(frozen=True)
class Taps:
    """For each output place of an axis, the input places it sums and their weights; both [n, out, taps]."""

    places: Tensor  # int64, within the image
    weights: Tensor  # float32; 0 where a place only fills up
    counts: np.ndarray  # int [n]: taps that this image needs; the rest have weight 0


def resample(
    images: Images, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int], device: str, form: str | None = None
) -> Tensor:
    """Resize the box of each image to `size`: float32 [n, channels, height, width] in [0, 255] on `device`.

    boxes: [n, 4] (top, left, bottom, right) in pixels, edges may be fractional; flips: bool [n], mirror
    left to right; form: "dense" or "banded", by default what suits the device.
    """
    form = form or ("banded" if device == "cpu" else "dense")
    boxes = boxes.astype(np.float64)
    windows = _windows(images, boxes, size)
    rows = bicubic_taps(boxes[:, 0::2], windows[:, 0::2], size[0], np.zeros_like(flips), device)
    columns = bicubic_taps(boxes[:, 1::2], windows[:, 1::2], size[1], flips, device)
    pad, weigh = (_pad_by_image, _weigh_banded) if form == "banded" else (_pad_by_gather, _weigh_dense)
    n, channels = len(boxes), images.channels
    resized = torch.empty((n, channels, *size), dtype=torch.float32, device=device)
    on_device = torch.from_numpy(images.pixels).to(device, non_blocking=True) if form == "dense" else None
    for part in _chunks(windows, channels, CHUNK_VALUES[form]):
        padded = pad(images, windows, part, on_device)  # [k, h, w * channels]
        wide = padded.shape[2] // channels
        short = weigh(rows, part, padded).view(-1, size[0], wide, channels)
        turned = short.transpose(1, 2).reshape(-1, wide, size[0] * channels).contiguous()
        small = weigh(columns, part, turned).view(-1, size[1], size[0], channels)
        torch.clamp(small.permute(0, 3, 2, 1), 0, 255, out=resized[part])
    return resized


def bicubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, Pillow's; exactly 1 at 0 and 0 at whole numbers."""
    a, x = -0.5, x.abs()
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, inner, torch.where(x < SUPPORT, outer, torch.zeros_like(x)))


def bicubic_taps(edges: np.ndarray, windows: np.ndarray, out: int, flips: np.ndarray, device: str) -> Taps:
    """Taps that resize [edges[:, 0], edges[:, 1]) of an axis to `out` places, mirrored where `flips`.

    windows: int [n, 2], the first and past-the-last place that is there to read; the places of the
    taps count from the window's first.
    """
    scales = (edges[:, 1] - edges[:, 0]) / out
    stretches = np.maximum(scales, 1.0)  # shrinking widens the kernel: that is the antialiasing
    counts = np.ceil(2 * SUPPORT * stretches).astype(np.int64) + 1
    low, scale, stretch, size, flip = (
        torch.from_numpy(values).to(device)[:, None]
        for values in (edges[:, 0] - windows[:, 0], scales, stretches, windows[:, 1] - windows[:, 0], flips)
    )
    place = torch.arange(out, dtype=torch.float64, device=device)
    centers = low + (torch.where(flip, out - 1 - place, place) + 0.5) * scale  # [n, out]
    first = torch.floor(centers - SUPPORT * stretch + 0.5)
    places = first[:, :, None] + torch.arange(int(counts.max()), device=device)
    weights = bicubic((places + 0.5 - centers[:, :, None]) / stretch[:, :, None])
    weights = weights * ((places >= 0) & (places < size[:, :, None]))
    # Added in order, so that zeros that only fill up cannot change the total's bits; sum() may, and cumsum() is
    # refused on a GPU by train.deterministic.
    weights = weights / reduce(torch.add, weights.unbind(-1))[:, :, None]
    within = torch.minimum(places.long().clamp_(min=0), size[:, :, None] - 1)
    return Taps(within, weights.float(), counts)


def _windows(images: Images, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The part of each image that its box's taps read: int64 [n, 4] (top, left, bottom, right)."""
    sides = np.stack([images.heights, images.widths], axis=1)
    scales = (boxes[:, 2:] - boxes[:, :2]) / np.array(size)
    reach = SUPPORT * np.maximum(scales, 1.0) - 0.5 * scales
    first = np.clip(np.floor(boxes[:, :2] - reach + 0.5), 0, sides - 1)
    last = np.clip(np.floor(boxes[:, 2:] + reach + 0.5), first + 1, sides)
    return np.concatenate([first, last], axis=1).astype(np.int64)


def _chunks(windows: np.ndarray, channels: int, limit: int) -> Iterator[slice]:
    """Runs of images whose padded windows hold at most `limit` values together (or one image)."""
    heights, widths = windows[:, 2] - windows[:, 0], windows[:, 3] - windows[:, 1]
    start, height, width = 0, 0, 0
    for i, (h, w) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        height, width = max(height, h), max(width, w)
        if i > start and (i + 1 - start) * height * width * channels > limit:
            yield slice(start, i)
            start, height, width = i, h, w
    if start < len(windows):
        yield slice(start, len(windows))


def _pad_by_image(images: Images, windows: np.ndarray, part: slice, _: Tensor | None) -> Tensor:
    """Windows of a chunk, one copy an image: float32 [k, h, w * channels], 0 beyond an image's own."""
    cut, channels = windows[part], images.channels
    heights, widths = cut[:, 2] - cut[:, 0], cut[:, 3] - cut[:, 1]
    padded = np.zeros((len(cut), heights.max(), widths.max() * channels), dtype=np.float32)
    for k, (top, left, bottom, right) in enumerate(cut.tolist()):
        i = part.start + k
        height, width, offset = int(images.heights[i]), int(images.widths[i]) * channels, int(images.offsets[i])
        image = images.pixels[offset : offset + height * width].reshape(height, width)
        window = image[top:bottom, left * channels : right * channels]
        padded[k, : window.shape[0], : window.shape[1]] = window
    return torch.from_numpy(padded)


def _pad_by_gather(images: Images, windows: np.ndarray, part: slice, pixels: Tensor | None) -> Tensor:
    """The same windows by one gather of pixels on the device; beyond an image's own lie repeated ones."""
    assert pixels is not None
    device, channels = pixels.device, images.channels
    starts = images.offsets[part] + (windows[part, 0] * images.widths[part] + windows[part, 1]) * channels
    start, stride, height, width = (
        torch.from_numpy(values.astype(np.int64)).to(device)[:, None, None]
        for values in (starts, images.widths[part] * channels,
                       windows[part, 2] - windows[part, 0], windows[part, 3] - windows[part, 1])
    )  # fmt: skip
    cut = windows[part]
    y = torch.arange(int((cut[:, 2] - cut[:, 0]).max()), device=device)[None, :, None]
    x = torch.arange(int((cut[:, 3] - cut[:, 1]).max()), device=device)[None, None, :]
    where = start + torch.minimum(y, height - 1) * stride + torch.minimum(x, width - 1) * channels
    whole = pixels.as_strided((pixels.numel() - channels + 1, channels), (1, 1))  # a pixel from every byte on
    return whole[where].flatten(2).float()


def _weigh_banded(taps: Taps, part: slice, padded: Tensor) -> Tensor:
    """Sum the tapped rows: [k, in, values] -> [k, out, values]."""
    images, rows, values = padded.shape
    count = int(taps.counts[part].max())
    first_row = torch.arange(images)[:, None, None] * rows
    places = (taps.places[part, :, :count] + first_row).view(-1, count)
    weights = taps.weights[part, :, :count].reshape(-1, count)
    summed = embedding_bag(places, padded.view(-1, values), per_sample_weights=weights, mode="sum")
    return summed.view(images, -1, values)


def _weigh_dense(taps: Taps, part: slice, padded: Tensor) -> Tensor:
    """The same sums as a batched matrix product."""
    places, weights = taps.places[part], taps.weights[part]
    matrix = torch.zeros((*places.shape[:2], padded.shape[1]), dtype=torch.float32, device=padded.device)
    return torch.bmm(matrix.scatter_add_(2, places, weights), padded)
