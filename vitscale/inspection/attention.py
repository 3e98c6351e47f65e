"""Where a model looks: the attention of its last layer's heads, and attention rollout, over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.models.vit import ViTPreTrainedModel

ATTENDED, OPACITY = (0.88, 0.17, 0.03), 0.85  # an orange that few images have, and its opacity at the scale's end
BACKDROP, FADED = 0.65, 0.45  # the grey that the image is faded towards, and how much
PANEL = 2.4  # inches across


@dataclass(frozen=True)
class AttentionMaps:
    """How much each patch is looked at, as multiples of what it would get if all got alike; float32."""

    heads: np.ndarray  # [heads, rows, columns], of the last layer
    rollout: np.ndarray  # [rows, columns]
    asker: str  # whose attention it is


@torch.no_grad()
def attention_maps(model: ViTPreTrainedModel, pixel_values: Tensor) -> AttentionMaps:
    """The attention maps of one image, [1, channels, height, width], with nothing of it hidden.

    The class token's attention to the patches; where there is none, or the classifier reads the mean of
    the patches, the mean attention that a patch receives from all patches. What goes to the class token
    and registers is left out. Rollout: Abnar & Zuidema 2020 (arXiv 2005.00928), over all layers.
    """
    encoder, config, grid = model.base_model, model.config, model.grid(pixel_values)
    resized = tuple(pixel_values.shape[2:]) != pair(config.image_size)
    was_training = encoder.training
    encoder.eval()
    try:
        output = encoder(pixel_values, output_attentions=True, interpolate_pos_encoding=resized)
    finally:
        encoder.train(was_training)
    attentions = [weights[0].float() for weights in output.attentions]  # each [heads, tokens, tokens]
    by_cls, first_patch = config.pooling == "cls", config.num_prefix_tokens

    def of_patches(weights: Tensor) -> np.ndarray:
        """[..., tokens, tokens] -> [..., rows, columns], of mean 1."""
        rows = weights[..., :1, :] if by_cls else weights[..., first_patch:, :]
        received = rows[..., first_patch:].mean(-2)
        received = received / received.mean(-1, keepdim=True).clamp(min=torch.finfo(received.dtype).tiny)
        return received.unflatten(-1, grid).numpy()

    return AttentionMaps(
        heads=of_patches(attentions[-1]),
        rollout=of_patches(rollout(attentions)),
        asker="of the class token" if by_cls else "received, mean over all patches",
    )


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """How much of each token's input reaches each token at the end: [tokens, tokens], rows of sum 1.

    attentions: a layer [heads, tokens, tokens]. A layer passes on (mean over heads + identity) / 2, the
    identity being its residual connections (Abnar & Zuidema 2020, section 3).
    """
    tokens = attentions[0].shape[-1]
    reached = torch.eye(tokens, dtype=attentions[0].dtype, device=attentions[0].device)
    for weights in attentions:
        passed = (weights.mean(0) + torch.eye(tokens, dtype=weights.dtype, device=weights.device)) / 2
        reached = passed / passed.sum(-1, keepdim=True) @ reached
    return reached


def draw(maps: AttentionMaps, image: np.ndarray, path: Path, aspect: float | None = None, title: str = "") -> None:
    """A PNG: the image, and laid over it the rollout and every head, with their scales below.

    image: what the model sees, in [0, 1], [height, width, channels]; aspect: height over width to show
    it at (default: its own), since a processor may have squeezed it.
    """
    aspect = aspect or image.shape[0] / image.shape[1]
    panels = len(maps.heads) + 2
    columns = min(panels, max(3, math.ceil(math.sqrt(panels * aspect))))
    rows = math.ceil(panels / columns)
    heights = (rows * (PANEL * aspect + 0.25) + 0.5, 0.75)  # inches
    figure = Figure(figsize=(columns * PANEL, sum(heights)), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=heights)
    pictures, legend = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    places = list(pictures.subplots(rows, columns, squeeze=False).flat)
    for axes in places:
        axes.set_axis_off()

    height, width, channels = image.shape
    note = "" if channels in (1, 3) else f", first of {channels} channels"
    colours = image if channels == 3 else image[..., :1].repeat(3, axis=2)
    _panel(places[0], colours, aspect, f"the model's input, {height}x{width}{note}")
    grey = colours.mean(axis=2, keepdims=True) * (1 - FADED) + FADED * BACKDROP
    scales = scales_of(maps)
    _panel(places[1], laid_over(grey, scales["rollout"](maps.rollout)), aspect, "rollout over all layers")
    for number, (axes, head) in enumerate(zip(places[2:], maps.heads, strict=False)):
        _panel(axes, laid_over(grey, scales["heads"](head)), aspect, f"last layer, head {number}")

    for axes, (name, scale) in zip(legend.subplots(1, 2), scales.items(), strict=True):
        shown = ScalarMappable(scale, _legend_colours())
        extend = "both" if name == "heads" and maps.heads.max() > scale.vmax else "min"
        bar = legend.colorbar(shown, cax=axes, orientation="horizontal", extend=extend)
        bar.set_label(f"{name}: attention, in multiples of the mean patch's", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_box_aspect(0.06)
        bar.outline.set_visible(False)
    figure.suptitle("\n".join(filter(None, (title, f"Attention {maps.asker}"))), x=0.01, ha="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def scales_of(maps: AttentionMaps) -> dict[str, Normalize]:
    """What is drawn as nothing, a mean patch's attention, and as the full colour: twice that, or the most there is
    (of the heads the 99th percentile)."""
    highest = {"rollout": maps.rollout.max(), "heads": np.quantile(maps.heads, 0.99)}
    return {name: Normalize(1.0, max(2.0, float(value))) for name, value in highest.items()}


def _panel(axes: Axes, image: np.ndarray, aspect: float, title: str) -> None:
    small = max(image.shape[:2]) < 64  # its pixels are to be seen as they are
    axes.imshow(image, interpolation="nearest" if small else "antialiased", extent=(0, 1, 0, 1), aspect=aspect)
    axes.set_title(title, fontsize=8)


def laid_over(grey: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Colours [height, width, 3]: the more `strength` [rows, columns] a patch has, the more of the image it hides."""
    strength = np.clip(np.asarray(strength), 0, 1)
    for axis in (0, 1):  # a patch's value for each of its pixels
        strength = strength.repeat(grey.shape[axis] // strength.shape[axis], axis=axis)
    opacity = OPACITY * strength[..., None]
    return (1 - opacity) * grey + opacity * np.asarray(ATTENDED)


def _legend_colours() -> ListedColormap:
    """The colours as they look over a mid grey."""
    ramp = np.linspace(0, 1, 256)[:, None]
    return ListedColormap(laid_over(np.full((256, 1, 1), BACKDROP), ramp)[:, 0])
