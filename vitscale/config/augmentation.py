"""The section `augment` of a run's config: its keys, and the names, strings and presets that they hold."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from vitscale.config.typed import one_of, require
from vitscale.errors import ConfigError
from vitscale.text import did_you_mean

PRESETS: dict[str, dict[str, Any]] = {
    # MAE's pretraining (main_pretrain.py), and SimMIM's (data/data_simmim.py).
    "mae": {"crop_scale": (0.2, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5},
    "simmim": {"crop_scale": (0.67, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5},
    # 3-Augment of DeiT III (augment.py, README_revenge.md), and RandAugment as DeiT's and MAE's fine-tuning have it.
    "deit3": {
        "crop_scale": (0.08, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5, "three_augment": True,
        "color_jitter": (0.3, 0.3, 0.3, 0.0), "mixup": 0.8, "cutmix": 1.0, "repeats": 3,
    },
    "randaug": {
        "crop_scale": (0.08, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5,
        "rand_augment": "rand-m9-n2-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0,
    },
}  # fmt: skip


SHIFT = 4  # pixels by which the simple random crop moves


@dataclass(frozen=True)
class StepKind:
    """What a step of augment.steps does, and the range of its one parameter; no range: it has none."""

    meaning: str
    low: float | None = None
    high: float | None = None
    lowest: float = -math.inf  # what low and high must lie in
    highest: float = math.inf
    is_signed: bool = False  # the value's sign is drawn too
    needs_rgb: bool = False


# As torchvision's and Pillow's operations of these names; ranges as RandAugment has them at its largest magnitude.
STEPS: dict[str, StepKind] = {
    "brightness": StepKind("factor", 0.1, 1.9, 0.0),
    "contrast": StepKind("factor", 0.1, 1.9, 0.0),
    "saturation": StepKind("factor", 0.1, 1.9, 0.0, needs_rgb=True),
    "hue": StepKind("turn of the colour circle", -0.1, 0.1, -0.5, 0.5, needs_rgb=True),
    "sharpness": StepKind("factor", 0.1, 1.9, 0.0),
    "greyscale": StepKind("", needs_rgb=True),
    "invert": StepKind(""),
    "autocontrast": StepKind(""),
    "equalize": StepKind(""),
    "solarize": StepKind("threshold, of 256", 128, 128, 0, 256),
    "solarize_add": StepKind("what is added below 128", 0, 110, 0, 255),
    "posterize": StepKind("bits kept", 4, 8, 0, 8),
    "blur": StepKind("standard deviation in pixels", 0.1, 2.0, 0.01, 50.0),
    "shear_x": StepKind("of the height", 0.0, 0.3, is_signed=True),
    "shear_y": StepKind("of the width", 0.0, 0.3, is_signed=True),
    "translate_x": StepKind("of the width", 0.0, 0.45, is_signed=True),
    "translate_y": StepKind("of the height", 0.0, 0.45, is_signed=True),
    "rotate": StepKind("degrees", 0.0, 30.0, is_signed=True),
}


@dataclass(frozen=True)
class Step:
    """An operation on a share of the images, its parameter drawn evenly in [low, high]."""

    name: str
    probability: float = 1.0
    low: float | None = None  # null: the operation's own
    high: float | None = None

    def __post_init__(self) -> None:
        kind = STEPS.get(self.name)
        if kind is None:
            raise ConfigError(
                f"augment.steps: name={self.name!r}: must be one of {', '.join(STEPS)}{did_you_mean(self.name, STEPS)}"
            )
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"augment.steps: {self.name}: probability={self.probability}: must be in [0, 1]")
        if kind.low is None and (self.low, self.high) != (None, None):
            raise ConfigError(f"augment.steps: {self.name}: has no parameter; leave low and high out")
        low, high = self.range
        if not kind.lowest <= low <= high <= kind.highest:
            bounds = f"{kind.lowest:g} <= low <= high <= {kind.highest:g}"
            raise ConfigError(f"augment.steps: {self.name}: low={low:g}, high={high:g}: must be {bounds}")

    @property
    def range(self) -> tuple[float, float]:
        """Low and high as they are drawn from; (0, 0) where there is no parameter."""
        kind = STEPS[self.name]
        if kind.low is None or kind.high is None:
            return 0.0, 0.0
        low = kind.low if self.low is None else self.low
        return low, (max(low, kind.high) if self.high is None else self.high)


@dataclass(frozen=True)
class RandAugment:
    """Cubuk et al. 2020, arXiv 1909.13719, as timm's data/auto_augment.py has it."""

    magnitude: float = 10.0
    layers: int = 2  # operations an image, each one of `choices` with the same probability
    probability: float = 0.5  # that a chosen operation is applied
    deviation: float = 0.0  # of the magnitude, normal; infinite: the magnitude is drawn evenly from 0 up to it
    most: float = 10.0  # the largest magnitude drawn
    increasing: bool = False  # every operation is stronger at larger magnitudes


_SECTIONS = {"m": "magnitude", "p": "probability", "mstd": "deviation", "mmax": "most"}


def parse_rand_augment(text: str) -> RandAugment:
    """timm's string, say rand-m9-n2-mstd0.5-inc1; ConfigError for a section that is unknown or out of range."""
    kind, *sections = text.split("-")
    policy = RandAugment()
    for section in sections:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?|inf)", section)
        name, number = (match[1], float(match[2])) if match else ("", 0.0)
        if name == "inc":
            policy = replace(policy, increasing=number != 0)
        elif name == "n":
            policy = replace(policy, layers=int(number))
        elif name in _SECTIONS:
            policy = replace(policy, **{_SECTIONS[name]: number})  # type: ignore[arg-type]
        else:
            raise _wrong(text, f"its section {section!r} is none of mN, nN, pP, mstdS, mmaxN, inc0, inc1")
    if policy.deviation > 100:
        policy = replace(policy, deviation=math.inf)
    if kind != "rand":
        raise _wrong(text, "it must start with rand")
    if not (1 <= policy.layers <= 10 and 0 <= policy.probability <= 1 and policy.most > 0):
        raise _wrong(text, "1 <= n <= 10, 0 <= p <= 1 and mmax > 0 must hold")
    return policy


def _wrong(text: str, reason: str) -> ConfigError:
    return ConfigError(
        f"augment.rand_augment={text!r}: must be timm's string for RandAugment, say rand-m9-n2-mstd0.5-inc1; {reason}"
    )


@dataclass(frozen=True)
class Augmentation:
    """In the order of its keys, all on the device but the crop; every random number is hashed from the sample's key."""

    preset: str | None = None  # mae, simmim, deit3, randaug: its keys, where they are not written beside it
    repeats: int = 1  # views of a sample in an epoch, near each other (repeated augmentation); an epoch is as many
    # times longer
    crop: str = "resized"  # torchvision's RandomResizedCrop, or simple: as much as fits, then moved by up to 4 pixels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area; of crop=resized, as is the next
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width over height
    flip: float = 0.5  # probability of a horizontal mirror
    vertical_flip: float = 0.0
    quarter_turns: bool = False  # turned by 0, 90, 180 or 270 degrees, each as likely
    rand_augment: str | None = None  # timm's string, say rand-m9-n2-mstd0.5-inc1
    three_augment: bool = False  # grey, solarized or blurred, each as likely (DeiT III); RGB
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # of brightness, contrast, saturation, hue
    steps: tuple[Step, ...] = ()  # further ones: names or {name, probability, low, high}; names: STEPS
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # one a channel, or one for all, of pixels in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    erase: float = 0.0  # probability of a box of noise
    mixup: float = 0.0  # both parameters of the beta distribution of the shares; 0: none (timm's mixup)
    cutmix: float = 0.0  # likewise
    mix_probability: float = 1.0  # that a pair is mixed
    mix_switch: float = 0.5  # that it is by cutmix, where mixup is on too

    def __post_init__(self) -> None:
        if self.rand_augment is not None:
            parse_rand_augment(self.rand_augment)
        if self.preset is not None:
            one_of("augment.preset", self.preset, tuple(PRESETS))
        one_of("augment.crop", self.crop, ("resized", "simple"))
        require(1 <= self.repeats <= 64, "augment.repeats", self.repeats, "in 1 to 64")
        for name in ("vertical_flip", "erase", "mix_probability", "mix_switch"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "in [0, 1]")
        for name in ("mixup", "cutmix"):
            require(0 <= getattr(self, name) <= 100, f"augment.{name}", getattr(self, name), "in [0, 100]; 0: none")
        jitter = self.color_jitter
        fits = min(jitter) >= 0 and jitter[3] <= 0.5
        require(fits, "augment.color_jitter", jitter, "0 or more each, the last (hue) 0.5 at most")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, "0 < low <= high <= 1")
        low, high = self.crop_ratio
        require(0 < low <= high, "augment.crop_ratio", self.crop_ratio, "0 < low <= high")
        require(0 <= self.flip <= 1, "augment.flip", self.flip, "in [0, 1]")
        require(min(self.std, default=0) > 0, "augment.std", self.std, "above 0 in every channel")


def colour_operations(augment: Augmentation) -> list[str]:
    """Keys of the section, with their values, that only RGB images have a meaning for."""
    strengths = dict(zip(("brightness", "contrast", "saturation", "hue"), augment.color_jitter, strict=True))
    names = [f"color_jitter's {name}" for name, strength in strengths.items() if strength and STEPS[name].needs_rgb]
    names += [f"steps' {step.name}" for step in augment.steps if STEPS[step.name].needs_rgb]
    names += ["three_augment"] if augment.three_augment else []
    return names + (["rand_augment"] if augment.rand_augment else [])
