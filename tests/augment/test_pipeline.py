"""What Augment makes of a batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitscale import rng
from vitscale.augment.pipeline import Augment
from vitscale.config import schema


def a_batch(count: int = 64, size: tuple[int, int] = (9, 7), channels: int = 3, ids: np.ndarray | None = None):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, channels), dtype=np.uint8)
    ids = np.arange(count, dtype=np.int64) if ids is None else ids
    return SimpleNamespace(
        pixels=pixels[ids % count].reshape(-1),
        offsets=np.arange(len(ids), dtype=np.int64) * pixels[0].size,
        heights=np.full(len(ids), size[0], np.int32),
        widths=np.full(len(ids), size[1], np.int32),
        channels=channels,
        boxes=np.tile(np.array([[0, 0, *size]], np.float32), (len(ids), 1)),
        sample_keys=rng.sample_key(3, 1, ids),
    )


def images_of(batch) -> torch.Tensor:
    """The batch's own pixels in [0, 1]: [n, c, h, w]."""
    shape = (len(batch.offsets), int(batch.heights[0]), int(batch.widths[0]), batch.channels)
    return torch.from_numpy(batch.pixels).view(shape).permute(0, 3, 1, 2) / 255


def test_normalises_each_channel_and_does_not_flip_in_evaluation() -> None:
    batch = a_batch()
    section = schema.Augment(flip=1.0, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    ours = Augment(section, (9, 7), 3, "cpu", train=False)(batch)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, (images_of(batch) - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_one_mean_serves_all_channels(channels: int) -> None:
    batch = a_batch(channels=channels)
    ours = Augment(schema.Augment(flip=0.0, mean=(0.5,), std=(0.25,)), (9, 7), channels, "cpu", train=True)(batch)
    torch.testing.assert_close(ours, (images_of(batch) - 0.5) / 0.25, rtol=0, atol=1e-5)


def test_flips_by_sample_key() -> None:
    """About the share asked for, the same ones whatever the order, others in another epoch."""
    section = schema.Augment(flip=0.3, mean=(0.0,), std=(1.0,))
    augment = Augment(section, (9, 7), 3, "cpu", train=True)

    def flipped(batch) -> torch.Tensor:
        ours, plain = augment(batch), images_of(batch)
        same, mirrored = ((ours - other).abs().amax((1, 2, 3)) < 1e-4 for other in (plain, plain.flip(-1)))
        assert bool((same ^ mirrored).all())
        return mirrored

    first = flipped(a_batch(400))
    assert 0.2 < first.double().mean() < 0.4
    turned = np.arange(400, dtype=np.int64)[::-1].copy()
    assert torch.equal(flipped(a_batch(400, ids=turned)), first.flip(0))
    other_epoch = a_batch(400)
    other_epoch.sample_keys = rng.sample_key(3, 2, np.arange(400, dtype=np.int64))
    assert not torch.equal(flipped(other_epoch), first)


def test_resizes_to_height_and_width_in_that_order() -> None:
    augment = Augment(schema.Augment(mean=(0.5,), std=(0.5,)), (32, 16), 3, "cpu", train=True)
    assert augment(a_batch(5)).shape == (5, 3, 32, 16)
