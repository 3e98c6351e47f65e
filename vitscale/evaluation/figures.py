"""A run in pictures: its loss curve, what its model makes of hidden patches, and what its features see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

LOSS, RATE = "#1f5fa8", "#b4551e"
GOOD, BAD = "#2e7d32", "#c62828"
SHOWN = 12  # images in the figure of reconstructions
EDGE = "#c8c8c8"
HIDDEN = (0.56, 0.66, 0.77)  # a blue that neither a grey image nor most photographs have


def draw_curves(rows: Iterable[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """The loss and the learning rate over the steps as PNG; rows as in metrics.jsonl (step, loss, lr)."""
    kept = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in kept]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    losses = np.array([row["loss"] for row in kept], dtype=np.float64)  # a None of JSON becomes NaN: a gap
    marker = "o" if len(kept) < 3 else None
    upper.plot(steps, losses, color=LOSS, linewidth=1.4, marker=marker)
    if np.isfinite(losses).any():
        last = int(np.flatnonzero(np.isfinite(losses))[-1])
        upper.annotate(f"{losses[last]:.4g}", (steps[last], losses[last]), xytext=(0, 8), color=LOSS,
                       textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    upper.set_ylabel("loss")
    lower.plot(steps, [row.get("lr", float("nan")) for row in kept], color=RATE, linewidth=1.4, marker=marker)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    upper.set_title(title, loc="left", fontsize=11)
    _save(figure, path)


@dataclass(frozen=True)
class Reconstructions:
    """Images in [0, 1], each float32 [n, height, width, channels], and what to know about them."""

    original: np.ndarray
    masked: np.ndarray  # NaN in hidden patches
    reconstruction: np.ndarray  # hidden patches as the model thinks, the visible ones as they are
    note: str


@torch.inference_mode()
def reconstruct(
    model: ViTPreTrainedModel, pixel_values: Tensor, sample_key: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Reconstructions:
    """What an MAE, SimMIM or multitask model fills into the patches that `sample_key` hides.

    pixel_values: normalised by `mean` and `std` (one a channel, or one for all), [n, c, h, w].
    """
    model.eval()
    output = model(pixel_values=pixel_values, sample_key=sample_key)
    original, note = pixel_values.float(), ""
    if isinstance(model, ViTMAEForPreTraining):
        hidden, filled = output.mask > 0, model.reconstruct(pixel_values, output)
        if model.config.norm_pix_loss:
            note = "hidden patches take the true patch's mean and contrast (norm_pix_loss)"
    else:
        hidden, filled = output.bool_masked_pos, output.reconstruction.float()
    where = in_pixels(hidden, model.config.grid, pair(model.config.patch_size))
    original, filled = (seen(images, mean, std) for images in (original, filled))
    return Reconstructions(
        original=_channels_last(original),
        masked=_channels_last(original.masked_fill(where, float("nan"))),
        reconstruction=_channels_last(torch.where(where, filled, original)),
        note=note,
    )


def in_pixels(hidden: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Bool [n, 1, height, width] of what is told of patches, [n, patches]."""
    return hidden.view(-1, 1, *grid).repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)


def seen(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images in [0, 1] again, float32 [n, c, h, w], of those that were normalised."""
    scale, shift = (torch.tensor(values, device=pixel_values.device).view(1, -1, 1, 1) for values in (std, mean))
    return (pixel_values.float() * scale + shift).clamp(0, 1)


@dataclass(frozen=True)
class Features:
    """Images in [0, 1], float32 [n, height, width, channels], and what an encoder makes of them."""

    images: np.ndarray
    labels: np.ndarray  # int64 [n], -1 where there is none
    pooled: np.ndarray  # float32 [n, width]
    patches: np.ndarray  # float32 [SHOWN, rows, columns, width]


@torch.inference_mode()
def features_of(
    vit: ViTModel, pixel_values: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Features:
    """Of a batch of normalised images."""
    patches = vit.patch_tokens(vit(pixel_values=pixel_values).last_hidden_state).float()
    first = patches[:SHOWN].unflatten(1, vit.config.grid)
    images = _channels_last(seen(pixel_values, mean, std))
    return Features(images, labels.cpu().numpy(), patches.mean(dim=1).cpu().numpy(), first.cpu().numpy())


def draw_neighbours(features: Features, path: Path, title: str = "", queries: int = 8, neighbours: int = 6) -> None:
    """A PNG of images, each with those whose features are nearest (cosine) below it, framed by whether labels agree.

    Of a single image there is none.
    """
    if len(features.pooled) < 2:
        return
    unit = features.pooled / np.linalg.norm(features.pooled, axis=1, keepdims=True).clip(min=1e-12)
    queries, neighbours = min(queries, len(unit)), min(neighbours, len(unit) - 1)
    similarity = unit[:queries] @ unit.T
    similarity[np.arange(queries), np.arange(queries)] = -np.inf
    nearest = np.argsort(-similarity, axis=1)[:, :neighbours]
    grid = _Grid(["image", "nearest", *[""] * (neighbours - 1)], queries)
    for query in range(queries):
        grid.show(0, query, features.images[query])
        for place, other in enumerate(nearest[query], start=1):
            labels = features.labels[[query, other]]
            frame = None if labels.min() < 0 else GOOD if labels[0] == labels[1] else BAD
            grid.show(place, query, features.images[other], frame)
    labelled = "; green: of the same label, red: of another" if (features.labels >= 0).any() else ""
    grid.save(path, f"{title}\nnearest among {len(unit)} held-out images{labelled}")


def draw_patches(features: Features, path: Path, title: str = "") -> None:
    """A PNG of images, below each its patches in the colours of the first three principal components of all of them."""
    count, rows, columns, width = features.patches.shape
    flat = features.patches.reshape(-1, width).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    components = centred @ directions[:3].T
    low, high = np.percentile(components, [2, 98], axis=0)
    colours = np.zeros((len(flat), 3))
    colours[:, : components.shape[1]] = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    grid = _Grid(["image", "patches"], count)
    for column in range(count):
        grid.show(0, column, features.images[column])
        grid.show(1, column, colours.reshape(count, rows, columns, 3)[column])
    grid.save(path, f"{title}\nfeatures of patches: three principal components as red, green, blue")


def confusion_figure(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """matrix: int [classes, classes], rows the true class; shares of each row as shades, numbers where they fit."""
    count = len(names)
    figure = Figure(figsize=(4.4, 4.4), layout="constrained")
    axes = figure.subplots()
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= 20:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7, color=colour)
    if count <= 40:
        short = [name if len(name) <= 14 else name[:13] + "…" for name in names]
        axes.set_xticks(range(count), short, rotation=90, fontsize=7)
        axes.set_yticks(range(count), short, fontsize=7)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    return figure


def _channels_last(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).cpu().numpy()


def draw_reconstructions(panels: Reconstructions, path: Path, title: str = "") -> None:
    """A PNG of one column an image: original, masked, reconstruction below each other."""
    rows = {"original": panels.original, "masked": panels.masked, "reconstruction": panels.reconstruction}
    grid = _Grid(list(rows), len(panels.original))
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            grid.show(row, column, image)
    grid.save(path, "\n".join(line for line in (title, panels.note, _channel_note(panels.original)) if line))


def draw_sheet(panels: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str], path: Path, title: str) -> None:
    """A PNG of images side by side, eight a line, each with its caption below it.

    panels: by name what is shown of every image, one below the other; each [height, width, channels] in [0, 1], of any
    size, NaN where it is hidden. A caption may have several lines.
    """
    count, kinds = len(captions), list(panels)
    columns = min(count, 8)
    lines = -(-count // columns)
    texts = max(caption.count("\n") + 1 for caption in captions)
    figure = Figure(
        figsize=(1.5 * columns + 0.3, lines * (1.5 * len(kinds) + 0.13 * texts) + 0.5), layout="constrained"
    )
    grid = figure.subplots(lines * len(kinds), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, caption in enumerate(captions):
        line, column = divmod(number, columns)
        for row, kind in enumerate(kinds):
            axes = grid[line * len(kinds) + row, column]
            axes.set_axis_on()
            _show(axes, panels[kind][number])
            if column == 0 and len(kinds) > 1:
                axes.set_ylabel(kind, fontsize=7)
        axes.set_xlabel(caption, fontsize=6, labelpad=2, parse_math=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    _save(figure, path)


class _Grid:
    """Images in named rows, and columns; all on one Axes: with one for each they would take twice as long to draw."""

    def __init__(self, rows: Sequence[str], columns: int) -> None:
        self._figure = Figure(figsize=(1.2 * columns + 1.2, 1.2 * len(rows) + 0.7), layout="constrained")
        self._axes = self._figure.subplots()
        self._axes.set(xlim=(0, columns), ylim=(len(rows), 0), xticks=[])
        self._axes.set_yticks([row + 0.5 for row in range(len(rows))], rows, rotation=90, va="center", fontsize=10)
        self._axes.tick_params(length=0)
        self._axes.spines[:].set_visible(False)

    def show(self, row: int, column: int, image: np.ndarray, frame: str | None = None) -> None:
        """An image [h, w, c] in the middle of its cell, in a thin frame or one of this colour."""
        height, width = (0.94 * side / max(image.shape[:2]) for side in image.shape[:2])
        left, top = column + (1 - width) / 2, row + (1 - height) / 2
        _draw(self._axes, image, extent=(left, left + width, top + height, top))
        line = 2.5 if frame else 0.8
        self._axes.add_patch(Rectangle((left, top), width, height, fill=False, color=frame or EDGE, linewidth=line))

    def save(self, path: Path, title: str) -> None:
        self._figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        _save(self._figure, path)


def _show(axes: Axes, image: np.ndarray) -> None:
    """One image [h, w, c] on Axes of its own."""
    _draw(axes, image)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_edgecolor(EDGE)


def _draw(axes: Axes, image: np.ndarray, **options: Any) -> None:
    """In colour with 3 channels, else the first channel in grey; HIDDEN where it is NaN."""
    colours = image if image.shape[2] == 3 else image[..., :1].repeat(3, axis=2)
    small = max(image.shape[:2]) < 64  # its pixels are to be seen as they are
    shown = np.where(np.isnan(colours), HIDDEN, colours)
    axes.imshow(shown, interpolation="nearest" if small else "antialiased", **options)


def _channel_note(images: np.ndarray) -> str:
    return "" if images.shape[3] in (1, 3) else f"first of {images.shape[3]} channels"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})  # the same bytes from the same rows
