"""Random operations in layers: in each layer an image gets one operation of several with a value of its own, or none.

RandAugment, 3-Augment, colour jitter and augment.steps differ in how operation and value are drawn alone. What was
drawn is known on the host, so the images that share an operation are one sub-batch without a look at the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from vitscale import rng
from vitscale.augment import geometry, pixels
from vitscale.augment.operations import Drawn, ModelInputs, RaggedBatch
from vitscale.config.augmentation import STEPS, RandAugment, Step

PixelOperation = Callable[[Tensor, Tensor], Tensor]  # images [k, channels, height, width], value [k] -> images
_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_JITTERED = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Layer:
    """What n images get: the place of each one's operation among `names`, -1 for none, and its value."""

    names: Sequence[str]
    choice: np.ndarray  # int64 [n]
    value: np.ndarray  # float [n]


Policy = Callable[[np.ndarray], list[Layer]]  # sample keys int64 [n] -> the layers, in their order


class RandomSteps:
    """An Operation: the layers of a policy, applied to images in [0, 255]."""

    def __init__(self, policy: Policy, fill: Tensor, blur_radius: int = 6) -> None:
        """fill: float32 [channels] on the device, what comes in from beyond the border; blur_radius: in pixels."""
        self._policy, self._fill, self._blur_radius = policy, fill, blur_radius

    def draw(self, batch: RaggedBatch) -> Drawn:
        """For each operation of each layer the images that get it, and their values: "LAYER NAME" and "... value"."""
        drawn = {}
        for number, layer in enumerate(self._policy(batch.sample_keys)):
            for place, name in enumerate(layer.names):
                images = np.flatnonzero(layer.choice == place)
                if len(images):
                    drawn[f"{number} {name}"] = images
                    drawn[f"{number} {name} value"] = layer.value[images].astype(np.float32)
        return drawn

    def apply(self, inputs: ModelInputs, drawn: Drawn, on_device: Mapping[str, Tensor]) -> ModelInputs:
        images = inputs.pixel_values.clone()
        for label in drawn:
            if label.endswith(" value"):
                continue
            operation, chosen = self._operation(label.split()[1]), on_device[label]
            changed = operation(images.index_select(0, chosen), on_device[f"{label} value"])
            images.index_copy_(0, chosen, changed)
        return replace(inputs, pixel_values=images)

    def _operation(self, name: str) -> PixelOperation:
        if name in _GEOMETRIC:
            return partial(getattr(geometry, name), fill=self._fill)
        if name == "blur":
            return partial(pixels.blur, radius=self._blur_radius)
        return getattr(pixels, name)


def steps(chosen: Sequence[Step]) -> Policy:
    """augment.steps: each in its turn, with its probability and range."""

    def draw(keys: np.ndarray) -> list[Layer]:
        return [_step(keys, number, step) for number, step in enumerate(chosen)]

    return draw


def _step(keys: np.ndarray, number: int, step: Step) -> Layer:
    draws = rng.uniform(keys, f"step {number} {step.name}", 3)
    low, high = step.range
    value = low + (high - low) * draws[:, 1]
    if STEPS[step.name].is_signed:
        value = np.where(draws[:, 2] < 0.5, -value, value)
    return Layer([step.name], np.where(draws[:, 0] < step.probability, 0, -1), value)


def three_augment(keys: np.ndarray) -> list[Layer]:
    """Grey, solarized or blurred (Touvron et al. 2022, arXiv 2204.07118; deit's augment.py): a Policy."""
    draws = rng.uniform(keys, "three_augment", 2)
    choice = (3 * draws[:, 0]).astype(np.int64)
    return [Layer(["greyscale", "solarize", "blur"], choice, np.where(choice == 1, 128, 0.1 + 1.9 * draws[:, 1]))]


def color_jitter(strengths: tuple[float, float, float, float]) -> Policy:
    """torchvision's ColorJitter of (brightness, contrast, saturation, hue), in an order of each image's own."""
    used = [place for place, strength in enumerate(strengths) if strength > 0]
    names = [_JITTERED[place] for place in used]
    low = np.array([-strengths[3] if place == 3 else max(0.0, 1 - strengths[place]) for place in used])
    high = np.array([strengths[3] if place == 3 else 1 + strengths[place] for place in used])

    def draw(keys: np.ndarray) -> list[Layer]:
        draws = rng.uniform(keys, "color_jitter", 2 * len(used))
        values = low + (high - low) * draws[:, : len(used)]
        order = np.argsort(draws[:, len(used) :], axis=1)  # [n, layers]
        return [Layer(names, choice, values[np.arange(len(keys)), choice]) for choice in order.T]

    return draw


def rand_augment(policy: RandAugment) -> Policy:
    """Layers of one operation in 15, each image's own, at the policy's magnitude."""
    names = list(_LEVELS)

    def draw(keys: np.ndarray) -> list[Layer]:
        return [_rand_layer(rng.uniform(keys, f"rand_augment {number}", 6)) for number in range(policy.layers)]

    def _rand_layer(draws: np.ndarray) -> Layer:
        choice = (len(names) * draws[:, 0]).astype(np.int64)
        level, sign = _level(policy, draws[:, 2:5]), np.where(draws[:, 5] < 0.5, -1.0, 1.0)
        values = np.stack([_LEVELS[name](level, sign, policy.increasing) for name in names], axis=1)
        value = values[np.arange(len(choice)), choice]
        return Layer(names, np.where(draws[:, 1] < policy.probability, choice, -1), value)

    return draw


def _level(policy: RandAugment, draws: np.ndarray) -> np.ndarray:
    """Magnitudes as a share of 10: float [n] of uniform draws [n, 3]."""
    if math.isinf(policy.deviation):
        magnitude = policy.magnitude * draws[:, 0]
    else:  # normal, by Box and Muller
        normal = np.sqrt(-2 * np.log1p(-draws[:, 1])) * np.cos(2 * np.pi * draws[:, 2])
        magnitude = policy.magnitude + policy.deviation * normal
    return np.clip(magnitude, 0, policy.most) / 10


def _factor(level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    return np.maximum(0.1, 1 + 0.9 * level * sign) if increasing else 1.8 * level + 0.1


def _bits(level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    return np.maximum(0, 4 - np.floor(4 * level) if increasing else np.floor(4 * level))


def _threshold(level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    kept = np.minimum(256, np.floor(256 * level))
    return 256 - kept if increasing else kept


def _signed(most: float) -> Callable[[np.ndarray, np.ndarray, bool], np.ndarray]:
    return lambda level, sign, increasing: most * level * sign


# Magnitude (a share of 10), sign and `increasing` -> value, as timm's LEVEL_TO_ARG of the operation that it calls so.
_LEVELS: dict[str, Callable[[np.ndarray, np.ndarray, bool], np.ndarray]] = {
    "autocontrast": _signed(0),
    "equalize": _signed(0),
    "invert": _signed(0),
    "rotate": _signed(30),
    "posterize": _bits,
    "solarize": _threshold,
    "solarize_add": lambda level, sign, increasing: np.minimum(128, np.floor(110 * level)),
    "saturation": _factor,
    "contrast": _factor,
    "brightness": _factor,
    "sharpness": _factor,
    "shear_x": _signed(0.3),
    "shear_y": _signed(0.3),
    "translate_x": _signed(0.45),
    "translate_y": _signed(0.45),
}
RAND_OPERATIONS = tuple(_LEVELS)
