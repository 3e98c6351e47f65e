"""A run in pictures: its loss curve, and what its model makes of hidden patches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.vit import ViTPreTrainedModel

LOSS, RATE, QUIET = "#1f5fa8", "#b4551e", "#6b6b6b"
SHOWN = 12  # images in the figure of reconstructions
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
    (rows, columns), (height, width) = model.config.grid, pair(model.config.patch_size)
    where = hidden.view(-1, 1, rows, columns).repeat_interleave(height, 2).repeat_interleave(width, 3)
    scale, shift = (torch.tensor(values, device=original.device).view(1, -1, 1, 1) for values in (std, mean))
    original, filled = ((images * scale + shift).clamp(0, 1) for images in (original, filled))
    return Reconstructions(
        original=_channels_last(original),
        masked=_channels_last(original.masked_fill(where, float("nan"))),
        reconstruction=_channels_last(torch.where(where, filled, original)),
        note=note,
    )


def _channels_last(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).cpu().numpy()


def draw_reconstructions(panels: Reconstructions, path: Path, title: str = "") -> None:
    """A PNG of one column an image: original, masked, reconstruction below each other."""
    rows = {"original": panels.original, "masked": panels.masked, "reconstruction": panels.reconstruction}
    count = len(panels.original)
    figure = Figure(figsize=(1.2 * count + 1.2, 1.2 * len(rows) + 0.7), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(axes_row, images, strict=True):
            _show(axes, image)
        axes_row[0].set_ylabel(name, fontsize=10)
    heading = "\n".join(line for line in (title, panels.note, _channel_note(panels.original)) if line)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10)
    _save(figure, path)


def _show(axes: Axes, image: np.ndarray) -> None:
    """One image [h, w, c]: in colour with 3 channels, else its first channel in grey; HIDDEN where it is NaN."""
    colours = image if image.shape[2] == 3 else image[..., :1].repeat(3, axis=2)
    small = max(image.shape[:2]) < 64  # its pixels are to be seen as they are
    axes.imshow(np.where(np.isnan(colours), HIDDEN, colours), interpolation="nearest" if small else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_edgecolor("#c8c8c8")


def _channel_note(images: np.ndarray) -> str:
    return "" if images.shape[3] in (1, 3) else f"first of {images.shape[3]} channels"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})  # the same bytes from the same rows
