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

from collections.abc import Iterator, Mapping
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
class Taps:
    """For each output place of an axis, the input places it sums and their weights; both [n, out, taps]."""

    places: Tensor  # int64, within the image's window
    weights: Tensor  # float32; 0 where a place only fills up
    counts: np.ndarray  # int64 [n]: taps that this image needs; the rest have weight 0


def plan(
    offsets: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    channels: int,
    boxes: np.ndarray,
    flips: np.ndarray,
    size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """The host's part of `resample`: all that it needs to know of n images.

    Image i is HWC from offsets[i] on; boxes: [n, 4] (top, left, bottom, right) in pixels, edges may be
    fractional; flips: bool [2, n], mirror top to bottom and left to right. Of an image only the window that its
    box's taps read is looked at. "low", "scale", "stretch", "extent", "flip" and "taps" are [2, n], rows then
    columns; "start" and "stride" are [n], in bytes.
    """
    boxes, sides = boxes.astype(np.float64), np.stack([heights, widths], axis=1)
    scales = (boxes[:, 2:] - boxes[:, :2]) / np.array(size)
    stretches = np.maximum(scales, 1.0)  # shrinking widens the kernel: that is the antialiasing
    reach = SUPPORT * stretches - 0.5 * scales
    first = np.clip(np.floor(boxes[:, :2] - reach + 0.5), 0, sides - 1).astype(np.int64)
    last = np.clip(np.floor(boxes[:, 2:] + reach + 0.5), first + 1, sides).astype(np.int64)
    strides = widths.astype(np.int64) * channels
    return {
        "low": (boxes[:, :2] - first).T,  # the box's first edge, from the window's
        "scale": scales.T,
        "stretch": stretches.T,
        "extent": (last - first).T,  # of the window
        "flip": flips,
        "taps": (np.ceil(2 * SUPPORT * stretches).astype(np.int64) + 1).T,
        "start": offsets + first[:, 0] * strides + first[:, 1] * channels,  # of the window
        "stride": strides,
    }


def resample(
    pixels: Tensor,
    channels: int,
    size: tuple[int, int],
    planned: Mapping[str, np.ndarray],
    on_device: Mapping[str, Tensor],
    form: str | None = None,
) -> Tensor:
    """Resize the box of each image to `size`: float32 [n, channels, height, width] in [0, 255].

    pixels: uint8 [bytes]; planned: `plan`'s arrays; on_device: the same ones beside the pixels. Shapes are
    decided by the first, values come from the second: nothing waits for the device. form: "dense" or
    "banded", by default what suits the device.
    """
    form = form or ("banded" if pixels.device.type == "cpu" else "dense")
    rows, columns = (_axis_taps(axis, out, planned, on_device) for axis, out in enumerate(size))
    pad, weigh = (_pad_by_image, _weigh_banded) if form == "banded" else (_pad_by_gather, _weigh_dense)
    resized = pixels.new_empty((len(planned["start"]), channels, *size), dtype=torch.float32)
    for part in _chunks(planned["extent"], channels, CHUNK_VALUES[form]):
        padded = pad(pixels, channels, part, planned, on_device)  # [k, h, w * channels]
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


def _axis_taps(axis: int, out: int, planned: Mapping[str, np.ndarray], on_device: Mapping[str, Tensor]) -> Taps:
    """Taps that resize the boxes along an axis (0: rows, 1: columns) to `out` places, mirrored where flipped."""
    low, scale, stretch, extent, flip = (
        on_device[name][axis][:, None] for name in ("low", "scale", "stretch", "extent", "flip")
    )
    counts = planned["taps"][axis]
    place = torch.arange(out, dtype=torch.float64, device=low.device)
    centers = low + (torch.where(flip, out - 1 - place, place) + 0.5) * scale  # [n, out]
    first = torch.floor(centers - SUPPORT * stretch + 0.5)
    places = first[:, :, None] + torch.arange(int(counts.max()), device=low.device)
    weights = bicubic((places + 0.5 - centers[:, :, None]) / stretch[:, :, None])
    weights = weights * ((places >= 0) & (places < extent[:, :, None]))
    # Added in order, so that zeros that only fill up cannot change the total's bits; sum() may, and cumsum() is
    # refused on a GPU by train.deterministic.
    weights = weights / reduce(torch.add, weights.unbind(-1))[:, :, None]
    within = torch.minimum(places.long().clamp_(min=0), extent[:, :, None] - 1)
    return Taps(within, weights.float(), counts)


def _chunks(extent: np.ndarray, channels: int, limit: int) -> Iterator[slice]:
    """Runs of images whose padded windows hold at most `limit` values together (or one image)."""
    start, height, width = 0, 0, 0
    for i, (h, w) in enumerate(extent.T.tolist()):
        height, width = max(height, h), max(width, w)
        if i > start and (i + 1 - start) * height * width * channels > limit:
            yield slice(start, i)
            start, height, width = i, h, w
    if start < extent.shape[1]:
        yield slice(start, extent.shape[1])


def _pad_by_image(
    pixels: Tensor, channels: int, part: slice, planned: Mapping[str, np.ndarray], _: Mapping[str, Tensor]
) -> Tensor:
    """Windows of a chunk, one copy an image: float32 [k, h, w * channels], 0 beyond an image's own."""
    heights, widths = planned["extent"][:, part]
    starts, strides = planned["start"][part], planned["stride"][part]
    padded = torch.zeros((len(starts), int(heights.max()), int(widths.max()) * channels))
    for window, *place in zip(padded, heights, widths * channels, starts, strides, strict=True):
        height, row, start, stride = map(int, place)
        window[:height, :row] = pixels.as_strided((height, row), (stride, 1), start)
    return padded


def _pad_by_gather(
    pixels: Tensor, channels: int, part: slice, planned: Mapping[str, np.ndarray], on_device: Mapping[str, Tensor]
) -> Tensor:
    """The same windows by one gather of pixels on the device; beyond an image's own lie repeated ones."""
    rows, columns = planned["extent"][:, part].max(axis=1).tolist()
    start, stride = (on_device[name][part][:, None, None] for name in ("start", "stride"))
    height, width = on_device["extent"][:, part, None, None]
    y = torch.arange(rows, device=pixels.device)[None, :, None]
    x = torch.arange(columns, device=pixels.device)[None, None, :]
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
