from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale import rng
from vitscale.data.crop import CenterCrop, Crop, RandomCrop, SimpleCrop, evaluation_crop

KEYS = rng.sample_key(0, 0, np.arange(4000, dtype=np.int64))


def drawn(crop: Crop, height: int, width: int) -> np.ndarray:
    return crop.boxes(KEYS, np.full(len(KEYS), height), np.full(len(KEYS), width))


@settings(max_examples=80)
@given(
    st.integers(1, 5000), st.integers(1, 5000), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.floats(0.1, 8.0),
    st.floats(1.0, 4.0), st.floats(0.05, 1.0),
)  # fmt: skip
def test_boxes_lie_inside(h: int, w: int, low: float, span: float, ratio: float, wider: float, part: float) -> None:
    for crop in (RandomCrop((low, low + (1 - low) * span), (ratio, ratio * wider)), CenterCrop(part, ratio)):
        top, left, bottom, right = crop.boxes(KEYS[:40], np.full(40, h), np.full(40, w)).T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (bottom > top).all()
        assert (right > left).all()
        assert (bottom <= h).all()
        assert (right <= w).all()


def test_a_box_depends_on_its_own_key_and_size_only() -> None:
    crop = RandomCrop((0.2, 1.0), (0.75, 4 / 3))
    heights, widths = np.arange(100, 4100), np.arange(4100, 100, -1)
    together = crop.boxes(KEYS, heights, widths)
    alone = [crop.boxes(KEYS[i : i + 1], heights[i : i + 1], widths[i : i + 1])[0] for i in range(0, 4000, 400)]
    assert together[::400].tolist() == np.array(alone).tolist()


def by_torchvision(draws: np.ndarray, height: int, width: int) -> list[int]:
    """RandomResizedCrop.get_params as torchvision writes it, with these draws for its random numbers."""
    for attempt in range(10):
        target_area = height * width * (0.2 + 0.8 * draws[attempt])
        aspect_ratio = math.exp(math.log(0.75) + (math.log(4 / 3) - math.log(0.75)) * draws[10 + attempt])
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            i, j = int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1))
            return [i, j, i + h, j + w]
    in_ratio = width / height
    if in_ratio < 0.75:
        w, h = width, round(width / 0.75)
    elif in_ratio > 4 / 3:
        h, w = height, round(height * 4 / 3)
    else:
        w, h = width, height
    i, j = (height - h) // 2, (width - w) // 2
    return [i, j, i + h, j + w]


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (20, 20), (60, 400), (400, 60)])
def test_the_law_is_torchvisions(size: tuple[int, int]) -> None:
    ours = drawn(RandomCrop((0.2, 1.0), (0.75, 4 / 3)), *size)
    draws = rng.uniform(KEYS, "crop", 22)
    assert ours.tolist() == [by_torchvision(row, *size) for row in draws]


def test_whole_image_where_the_scale_is_one_and_the_ratio_fits() -> None:
    assert (drawn(RandomCrop((1.0, 1.0), (1.0, 1.0)), 50, 50) == [0, 0, 50, 50]).all()


def test_no_attempt_fits_a_long_image() -> None:
    """torchvision's way out: the middle, at the nearest ratio that is allowed."""
    assert (drawn(RandomCrop((1.0, 1.0), (0.75, 4 / 3)), 30, 300) == [0, 130, 30, 170]).all()


def test_center_crop() -> None:
    assert drawn(CenterCrop(0.875), 256, 400)[0].tolist() == [16, 88, 240, 312]
    assert drawn(CenterCrop(1.0, aspect=2.0), 300, 400)[0].tolist() == [50, 0, 250, 400]
    assert drawn(CenterCrop(0.5), 8, 8)[0].tolist() == [2, 2, 6, 6]
    assert evaluation_crop(0.875, (224, 224)) == CenterCrop(0.875)
    assert evaluation_crop(0.875, (32, 64)) == CenterCrop(32 / 37, aspect=2.0), (
        "a processor resizes to 37, not to 36.57"
    )


@pytest.mark.parametrize(("size", "aspect"), [((50, 80), 1.0), ((80, 50), 1.0), ((60, 60), 2.0), ((7, 90), 0.5)])
def test_the_simple_crop_is_the_largest_box_anywhere(size: tuple[int, int], aspect: float) -> None:
    boxes = drawn(SimpleCrop(aspect), *size)
    center = drawn(CenterCrop(1.0, aspect), *size)[0]
    tall, wide = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert set(tall.tolist()) == {int(center[2] - center[0])}
    assert set(wide.tolist()) == {int(center[3] - center[1])}
    for axis, length in enumerate(size):
        room = length - int((tall, wide)[axis][0])
        assert (boxes[:, axis].min(), boxes[:, axis].max()) == (0, room), "both ends are reached"
