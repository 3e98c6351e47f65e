"""Which operations images get, with what values: as timm and torchvision draw them, and by the sample's key alone."""

from __future__ import annotations

import random
from inspect import signature
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageOps

from tests.augment.pictures import pictures
from vitscale import rng
from vitscale.augment.operations import ModelInputs
from vitscale.augment.random_steps import (
    RAND_OPERATIONS,
    Layer,
    Policy,
    RandomSteps,
    color_jitter,
    rand_augment,
    steps,
    three_augment,
)
from vitscale.config.augmentation import STEPS, RandAugment, Step, parse_rand_augment
from vitscale.errors import ConfigError

KEYS = rng.sample_key(0, 0, np.arange(6000, dtype=np.int64))
TIMM = {"autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
        "posterize": "Posterize", "solarize": "Solarize", "solarize_add": "SolarizeAdd", "saturation": "Color",
        "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness", "shear_x": "ShearX",
        "shear_y": "ShearY", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel"}  # fmt: skip


def apply(policy: Policy, images: torch.Tensor, keys: np.ndarray) -> torch.Tensor:
    operation = RandomSteps(policy, torch.full((images.shape[1],), 100.0))
    drawn = operation.draw(SimpleNamespace(sample_keys=keys))
    on_device = {name: torch.from_numpy(array) for name, array in drawn.items()}
    return operation.apply(ModelInputs(images, torch.from_numpy(keys.copy()), None), drawn, on_device).pixel_values


@pytest.mark.parametrize("text", ["rand", "rand-m9-n2-mstd0.5-inc1", "rand-m5-n3-p0.7", "rand-m9-mstd101-mmax9-inc0"])
def test_a_string_means_what_timm_means(text: str) -> None:
    from timm.data.auto_augment import rand_augment_transform

    ours, theirs = parse_rand_augment(text), rand_augment_transform(text, {})
    assert [operation.name.removesuffix("Increasing") for operation in theirs.ops] == [TIMM[n] for n in RAND_OPERATIONS]
    assert ours.layers == theirs.num_layers
    for operation in theirs.ops:
        assert (ours.magnitude, ours.probability) == (operation.magnitude, operation.prob)
        assert (ours.deviation, ours.most) == (operation.magnitude_std, operation.magnitude_max or 10)
        base = operation.name.removesuffix("Increasing")
        if base in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"):
            assert operation.name.endswith("Increasing") == ours.increasing


@pytest.mark.parametrize(
    "text", ["", "rand-x1", "rand-m", "augmix-m3", "rand-n0", "rand-m9-p2", "rand-tweights", "RAND"]
)
def test_a_string_that_means_nothing_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"augment.rand_augment='{text}': must be timm's string"):
        parse_rand_augment(text)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("magnitude", [0.0, 3.3, 9.0, 10.0])
def test_values_are_timms(magnitude: float, increasing: bool) -> None:
    """What timm's operation is given at a magnitude, with either sign."""
    from timm.data.auto_augment import LEVEL_TO_ARG

    layers = rand_augment(RandAugment(magnitude=magnitude, increasing=increasing, layers=1, probability=1))(KEYS)
    random.seed(0)
    for place, name in enumerate(RAND_OPERATIONS):
        key = TIMM[name] + ("Increasing" if increasing and f"{TIMM[name]}Increasing" in LEVEL_TO_ARG else "")
        function = LEVEL_TO_ARG[key]
        expected = {0.0} if function is None else {function(magnitude, {})[0] for _ in range(40)}
        got = set(np.unique(layers[0].value[layers[0].choice == place]).tolist())
        assert sorted(got | {0.0} if function is None else got) == pytest.approx(sorted(expected)), name


def test_how_often_and_how_strong() -> None:
    policy = parse_rand_augment("rand-m9-n2-mstd0.5-inc1")
    first, second = rand_augment(policy)(KEYS)
    for layer in (first, second):
        counts = np.bincount(layer.choice[layer.choice >= 0], minlength=15)
        assert 0.46 < counts.sum() / len(KEYS) < 0.54
        assert counts.min() > 140, "each of the 15 as often: 200"
    assert not np.array_equal(first.choice, second.choice)
    angles = np.abs(first.value[first.choice == RAND_OPERATIONS.index("rotate")])
    assert 26 < np.median(angles) < 28
    assert 0.7 < angles.std() < 1.9, "0.5 of 10 is 1.5 degrees, cut at 30"
    uniform = rand_augment(parse_rand_augment("rand-m8-mstd101"))(KEYS)[0]
    shears = np.abs(uniform.value[uniform.choice == RAND_OPERATIONS.index("shear_x")])
    assert 0 <= shears.min() < 0.02
    assert 0.22 < shears.max() <= 0.24


def test_jitter_in_an_order_of_each_images_own() -> None:
    """torchvision's: each operation once, all orders alike, and its ranges."""
    from torchvision.transforms import ColorJitter

    theirs = ColorJitter(0.4, 0.0, 0.2, 0.1)
    ranges = [range for range in (theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) if range]
    layers = color_jitter((0.4, 0.0, 0.2, 0.1))(KEYS)
    order = np.stack([layer.choice for layer in layers], axis=1)
    assert len(layers) == 3
    assert {tuple(row) for row in np.sort(order).tolist()} == {(0, 1, 2)}, "each once"
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 850, "each order as often: 1000"
    values = np.stack([layer.value for layer in layers], axis=1)
    for place, (low, high) in enumerate(ranges):
        got = values[order == place]
        assert low <= got.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < got.max() <= high


def test_three_augment() -> None:
    """deit's augment.py: one of three, each as often: grey, ImageOps.solarize, a blur of radius uniform(0.1, 2)."""
    (layer,) = three_augment(KEYS)
    assert layer.names == ["greyscale", "solarize", "blur"]
    assert np.bincount(layer.choice).min() > 1850
    assert set(layer.value[layer.choice == 1]) == {signature(ImageOps.solarize).parameters["threshold"].default}
    blurs = layer.value[layer.choice == 2]
    assert 0.1 <= blurs.min() < 0.11
    assert 1.98 < blurs.max() <= 2.0


def test_steps_by_their_probability_and_range() -> None:
    chosen = [Step("rotate", 0.3, 5, 10), Step("greyscale"), Step("posterize")]
    turned, grey, bits = steps(chosen)(KEYS)
    assert 0.27 < (turned.choice == 0).mean() < 0.33
    assert np.abs(turned.value).min() >= 5
    assert 0.45 < (turned.value > 0).mean() < 0.55
    assert (grey.choice == 0).all()
    assert 4 <= bits.value.min() <= bits.value.max() <= 8


@pytest.mark.parametrize("name", STEPS)
def test_every_step_runs_and_leaves_the_others_alone(name: str) -> None:
    images, keys = pictures(6), KEYS[:6]
    layer = Layer([name], np.array([0, -1, 0, -1, -1, 0]), np.full(6, sum(Step(name).range) / 2 + 0.01))
    got = apply(lambda keys: [layer], images, keys)
    assert got.shape == images.shape
    assert torch.equal(got[[1, 3, 4]], images[[1, 3, 4]])
    assert not torch.equal(got[[0, 2]], images[[0, 2]])


def test_by_the_key_alone() -> None:
    """In any company and order each image is changed in the same way."""
    images, keys = pictures(6), KEYS[40:46]
    for policy in (
        rand_augment(parse_rand_augment("rand-m9-n4-p1-inc1")),
        color_jitter((0.4, 0.4, 0.4, 0.1)),
        three_augment,
    ):
        together = apply(policy, images, keys)
        assert not torch.equal(together, images)
        turned = apply(policy, images.flip(0), keys[::-1].copy())
        torch.testing.assert_close(turned.flip(0), together, rtol=0, atol=1e-3)
        for place in range(6):
            alone = apply(policy, images[[place]], keys[[place]])
            torch.testing.assert_close(alone[0], together[place], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"name": "blurr"}, "name='blurr': must be one of .*did you mean blur"),
        ({"name": "blur", "probability": 1.5}, r"blur: probability=1.5: must be in \[0, 1\]"),
        ({"name": "invert", "low": 1.0}, "invert: has no parameter; leave low and high out"),
        ({"name": "posterize", "low": 5.0, "high": 3.0}, "low=5, high=3: must be 0 <= low <= high <= 8"),
        ({"name": "hue", "high": 0.7}, "low=-0.1, high=0.7: must be -0.5 <= low <= high <= 0.5"),
    ],
)
def test_steps_that_cannot_be(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Step(**keys)
