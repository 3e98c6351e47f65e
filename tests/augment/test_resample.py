"""The resampler against Pillow, its two forms against each other, and what it must not depend on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitscale import rng
from vitscale.augment import resample as module
from vitscale.augment.pipeline import upload
from vitscale.augment.resample import plan
from vitscale.data.crop import RandomCrop

FORMS = ("banded", "dense")


@dataclass(frozen=True)
class Images:
    """uint8 images of different sizes in one flat buffer: image i is HWC from offsets[i] on."""

    pixels: np.ndarray  # uint8 [bytes]
    offsets: np.ndarray  # int64 [n]
    heights: np.ndarray  # int32 [n]
    widths: np.ndarray  # int32 [n]
    channels: int


def both(flips: np.ndarray) -> np.ndarray:
    """As `plan` takes them: none top to bottom."""
    return flips if flips.ndim == 2 else np.stack([np.zeros_like(flips), flips])


def resample(
    images: Images, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int], device: str, form: str | None = None
) -> torch.Tensor:
    """Planned, sent to the device and resampled there."""
    planned = plan(images.offsets, images.heights, images.widths, images.channels, boxes, both(flips), size)
    (on_device,) = upload([planned], torch.device(device))
    pixels = torch.from_numpy(images.pixels).to(device)
    return module.resample(pixels, images.channels, size, planned, on_device, form)


def picture(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """Something like a photograph: smooth shades, hard edges, some noise; uint8 [h, w, c]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (random.uniform(1, 9) * x + random.uniform(1, 9) * y)) for _ in range(channels)]
    values = 128 + 60 * np.stack(waves, -1) + 60 * ((x - 0.4) ** 2 + (y - 0.3) ** 2 < 0.05)[..., None]
    return (values + random.normal(0, 5, values.shape)).clip(0, 255).astype(np.uint8)


def ragged(pictures: list[np.ndarray], gap: int = 0) -> Images:
    """The pictures in one buffer, `gap` foreign bytes before each."""
    parts, offsets, at = [], [], 0
    for image in pictures:
        parts += [np.full(gap, 77, np.uint8), image.reshape(-1)]
        offsets.append(at + gap)
        at += gap + image.size
    heights, widths = (np.array([image.shape[axis] for image in pictures], np.int32) for axis in (0, 1))
    return Images(np.concatenate(parts), np.array(offsets, np.int64), heights, widths, pictures[0].shape[2])


def by_pillow(image: np.ndarray, box: tuple[float, ...], flip: bool, size: tuple[int, int]) -> np.ndarray:
    """Pillow's crop, resize, mirror: float [c, h, w]."""
    top, left, bottom, right = box
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    resized = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, (left, top, right, bottom), None)
    if flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.atleast_3d(np.array(resized)).transpose(2, 0, 1).astype(np.float64)


CASES = {  # (height, width), box, target
    "whole, down": ((400, 500), (0, 0, 400, 500), (224, 224)),
    "whole box, down": ((375, 500), (20, 31, 330, 400), (224, 224)),
    "fractional box, down": ((375, 500), (20.25, 31.7, 330.6, 400.1), (224, 224)),
    "fractional box, up": ((60, 90), (3.3, 10.9, 40.2, 61.5), (224, 192)),
    "up one way, down the other": ((50, 700), (5.5, 60.25, 44.75, 655.0), (128, 96)),
    "far down": ((900, 1200), (0.4, 0.2, 899.5, 1199.9), (32, 32)),
    "a few pixels": ((8, 8), (0.3, 0.6, 7.1, 7.9), (8, 8)),
    "to one pixel": ((33, 21), (1, 2, 30, 20), (1, 1)),
    "from one pixel": ((1, 1), (0, 0, 1, 1), (4, 4)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_equals_pillow(name: str, channels: int) -> None:
    sides, box, target = CASES[name]
    images = [picture(*sides, channels, seed) for seed in (0, 1)]
    flips = np.array([False, True])
    boxes = np.array([box, box], np.float32)
    for form in FORMS:
        ours = resample(ragged(images), boxes, flips, target, "cpu", form).numpy()
        for image, flip, got in zip(images, flips, ours, strict=True):
            error = np.abs(got - by_pillow(image, tuple(boxes[0].tolist()), flip, target))
            assert error.mean() <= 1, f"{form}: mean error {error.mean():.3f} of 255"
            assert np.quantile(error, 0.999) <= 3, f"{form}: {np.quantile(error, 0.999):.3f} of 255, 99.9th percentile"


def directly(image: np.ndarray, box: np.ndarray, flip: bool, size: tuple[int, int]) -> np.ndarray:
    """The weighted sums in float64, each over all of the image: float [c, h, w]."""
    values = image.astype(np.float64)
    for axis, out in enumerate(size):
        scale = float(box[axis + 2] - box[axis]) / out
        centers = float(box[axis]) + (np.arange(out) + 0.5) * scale
        distances = (np.arange(image.shape[axis]) + 0.5 - centers[:, None]) / max(scale, 1.0)
        weights = module.bicubic(torch.from_numpy(distances)).numpy()
        weights /= weights.sum(axis=1, keepdims=True)
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return values.clip(0, 255)[:, :: -1 if flip else 1].transpose(2, 0, 1)


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_sums_over_the_whole_image(form: str) -> None:
    """Black and white pixels, so that sums go beyond [0, 255] and every pixel counts; boxes of any kind."""
    random = np.random.default_rng(0)
    sides = random.integers(1, 60, (40, 2))
    pictures = [255 * random.integers(0, 2, (height, width, 3), np.uint8) for height, width in sides]
    corners = np.sort(random.uniform(0, 1, (len(sides), 2, 2)), axis=1) * sides[:, None, :]
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 0.5], axis=1).clip(0, np.tile(sides, 2)).astype(np.float32)
    flips = random.random(len(sides)) < 0.5
    ours = resample(ragged(pictures), boxes, flips, (13, 9), "cpu", form).numpy()
    assert (ours.min(), ours.max()) == (0, 255)
    for image, box, flip, got in zip(pictures, boxes, flips, ours, strict=True):
        np.testing.assert_allclose(got, directly(image, box, flip, (13, 9)), rtol=0, atol=0.01)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12), st.integers(1, 200))
def test_chunks_are_as_large_as_the_limit_allows(sides: list[tuple[int, int]], limit: int) -> None:
    extent = np.array(sides, np.int64).reshape(-1, 2).T
    parts = [range(part.start, part.stop) for part in module._chunks(extent, 3, limit)]
    assert [number for part in parts for number in part] == list(range(len(sides)))

    def values(part: range) -> int:
        return len(part) * int(extent[0, part].max() * extent[1, part].max()) * 3

    assert all(len(part) == 1 or values(part) <= limit for part in parts)
    assert all(values(range(part.start, part.stop + 1)) > limit for part in parts[:-1])


def test_forms_agree_on_a_mixed_batch() -> None:
    sides = [(40, 300), (333, 77), (5, 9), (224, 224), (1, 50)]
    pictures = [picture(*side, 3, seed) for seed, side in enumerate(sides)]
    boxes = np.array(
        [[0, 0, 40, 300], [30.5, 3.25, 300, 70], [1, 2, 4, 6], [0, 0, 224, 224], [0, 1.5, 1, 49]], np.float32
    )
    flips = np.array([True, False, True, True, False])
    dense, banded = (resample(ragged(pictures, gap=5), boxes, flips, (48, 64), "cpu", form) for form in FORMS)
    torch.testing.assert_close(dense / 255, banded / 255, rtol=0, atol=1e-5)


PHOTOGRAPHS = {
    "of one size": [(375, 500)] * 6,
    "of several sizes": [(375, 500), (1200, 1600), (500, 375), (768, 1024), (1200, 900), (60, 80), (480, 640)],
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_forms_agree_on_photographs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, at the sizes that it is for, in several chunks of several images."""
    sides = np.array(PHOTOGRAPHS[name])
    images = ragged([picture(*side, 3, seed) for seed, side in enumerate(sides.tolist())], gap=1)
    keys = rng.sample_key(0, 0, np.arange(len(sides)))
    boxes = RandomCrop((0.2, 1.0), (0.75, 4 / 3)).boxes(keys, sides[:, 0], sides[:, 1]).astype(np.float32)
    boxes[1] = [0, 0, *sides[1]]
    flips = np.arange(len(sides)) % 2 == 0
    banded = resample(images, boxes, flips, (224, 224), "cpu", "banded")
    limit = int((sides.prod(axis=1) * 3).max()) * 2
    monkeypatch.setitem(module.CHUNK_VALUES, "dense", limit)
    planned = plan(images.offsets, images.heights, images.widths, 3, boxes, both(flips), (224, 224))
    chunks = list(module._chunks(planned["extent"], 3, limit))
    assert len(chunks) > 1
    assert max(part.stop - part.start for part in chunks) > 1
    dense = resample(images, boxes, flips, (224, 224), "cpu", "dense")
    torch.testing.assert_close(dense / 255, banded / 255, rtol=0, atol=1e-5)
    assert dense.std() > 30  # there is something to see in them


@pytest.mark.gpu
@pytest.mark.parametrize("sides", [
    [(40 + 90 * seed, 300 - 50 * seed) for seed in range(5)], *PHOTOGRAPHS.values()
], ids=["small", *PHOTOGRAPHS])  # fmt: skip
def test_gpu_equals_cpu(sides: list[tuple[int, int]]) -> None:
    images = ragged([picture(*side, 3, seed) for seed, side in enumerate(sides)], gap=5)
    boxes = np.stack([np.array([2.5, 3, height - 2, width - 1], np.float32) for height, width in sides])
    flips = np.arange(len(sides)) % 2 == 0
    cpu, gpu = (resample(images, boxes, flips, (48, 64), device).cpu() for device in ("cpu", "cuda"))
    torch.testing.assert_close(gpu / 255, cpu / 255, rtol=0, atol=1e-5)


@settings(max_examples=20)
@given(st.data())
def test_cpu_result_has_the_same_bits_in_any_company(data: st.DataObject) -> None:
    """The same samples are batched differently for other numbers of ranks."""
    count = data.draw(st.integers(2, 6))
    sides = data.draw(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=count, max_size=count))
    channels = data.draw(st.sampled_from([1, 3, 4]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    pictures = [random.integers(0, 256, (h, w, channels), dtype=np.uint8) for h, w in sides]
    corners = np.sort(random.uniform(0, 1, (count, 2, 2)), axis=1) * np.array(sides)[:, None, :]
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 0.5], axis=1).clip(0, np.tile(sides, 2)).astype(np.float32)
    flips = random.random(count) < 0.5
    together = resample(ragged(pictures), boxes, flips, (17, 24), "cpu")
    for i in range(count):
        alone = resample(ragged([pictures[i]]), boxes[i : i + 1], flips[i : i + 1], (17, 24), "cpu")
        assert torch.equal(together[i], alone[0])


def test_number_of_threads_does_not_change_bits() -> None:
    images = ragged([picture(150, 200, 3, seed) for seed in range(3)])
    boxes, flips = np.tile(np.array([[3.5, 8, 140, 190.25]], np.float32), (3, 1)), np.zeros(3, bool)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(resample(images, boxes, flips, (64, 64), "cpu"))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("form", FORMS)
def test_identity_is_exact(form: str) -> None:
    pictures = [np.random.default_rng(seed).integers(0, 256, (8, 8, 1), dtype=np.uint8) for seed in range(3)]
    boxes = np.tile(np.array([[0, 0, 8, 8]], np.float32), (3, 1))
    ours = resample(ragged(pictures), boxes, np.array([False, True, False]), (8, 8), "cpu", form).numpy()
    assert np.array_equal(ours[0, 0], pictures[0][..., 0])
    assert np.array_equal(ours[1, 0], pictures[1][:, ::-1, 0])


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_channels_each_on_its_own(form: str) -> None:
    image = picture(60, 50, 6)
    box, flips = np.array([[2.5, 3, 55, 44]], np.float32), np.array([True])
    whole = resample(ragged([image]), box, flips, (20, 30), "cpu", form)
    for channel in range(6):
        alone = resample(ragged([image[..., channel : channel + 1]]), box, flips, (20, 30), "cpu", form)
        torch.testing.assert_close(whole[:, channel], alone[:, 0], rtol=0, atol=2e-3)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [picture(20 + 15 * seed, 90 - 10 * seed, 1, seed) for seed in range(5)]
    boxes = np.array([[0, 0, *image.shape[:2]] for image in pictures], np.float32)
    extent = boxes[:, 2:].T.astype(np.int64)
    parts = list(module._chunks(extent, 1, 12000))
    assert 1 < len(parts) < 5
    whole = resample(ragged(pictures), boxes, np.zeros(5, bool), (16, 16), "cpu", "dense")
    monkeypatch.setitem(module.CHUNK_VALUES, "dense", 12000)
    split = resample(ragged(pictures), boxes, np.zeros(5, bool), (16, 16), "cpu", "dense")
    torch.testing.assert_close(whole, split, rtol=0, atol=1e-3)


def test_nothing_beyond_the_image_is_read() -> None:
    """A white image among black ones stays white to its edges."""
    white, black = np.full((30, 40, 1), 255, np.uint8), np.zeros((64, 64, 1), np.uint8)
    boxes = np.array([[0, 0, 64, 64], [0, 0, 30, 40], [0, 0, 64, 64]], np.float32)
    for form in FORMS:
        ours = resample(ragged([black, white, black], gap=3), boxes, np.zeros(3, bool), (32, 32), "cpu", form)
        assert ours[1].min() >= 255 - 1e-3
        assert ours[[0, 2]].max() == 0
