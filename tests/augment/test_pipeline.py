"""What Augment makes of a batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.host_syncs import HostSyncs
from tests.one_device import OneDevice
from vitscale import rng
from vitscale.augment.pipeline import Augment, upload
from vitscale.config.augmentation import STEPS, Augmentation, Step


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
        labels=ids % 10,
        sample_keys=rng.sample_key(3, 1, ids),
    )


def images_of(batch) -> torch.Tensor:
    """The batch's own pixels in [0, 1]: [n, c, h, w]."""
    shape = (len(batch.offsets), int(batch.heights[0]), int(batch.widths[0]), batch.channels)
    return torch.from_numpy(batch.pixels).view(shape).permute(0, 3, 1, 2) / 255


def test_normalises_each_channel_and_does_not_flip_in_evaluation() -> None:
    batch = a_batch()
    section = Augmentation(flip=1.0, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    ours = Augment(section, (9, 7), 3, "cpu", train=False)(batch).pixel_values
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, (images_of(batch) - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_one_mean_serves_all_channels(channels: int) -> None:
    batch = a_batch(channels=channels)
    augment = Augment(Augmentation(flip=0.0, mean=(0.5,), std=(0.25,)), (9, 7), channels, "cpu", train=True)
    torch.testing.assert_close(augment(batch).pixel_values, (images_of(batch) - 0.5) / 0.25, rtol=0, atol=1e-5)


def test_flips_by_sample_key() -> None:
    """About the share asked for, the same ones whatever the order, others in another epoch."""
    section = Augmentation(flip=0.3, mean=(0.0,), std=(1.0,))
    augment = Augment(section, (9, 7), 3, "cpu", train=True)

    def flipped(batch) -> torch.Tensor:
        ours, plain = augment(batch).pixel_values, images_of(batch)
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
    augment = Augment(Augmentation(mean=(0.5,), std=(0.5,)), (32, 16), 3, "cpu", train=True)
    assert augment(a_batch(5)).pixel_values.shape == (5, 3, 32, 16)


@pytest.mark.parametrize("wanted", [False, True])
def test_keys_come_along_and_labels_where_asked_for(wanted: bool) -> None:
    batch = a_batch(5)
    given = Augment(Augmentation(), (9, 7), 3, "cpu", train=True, labels=wanted)(batch)
    assert given.inputs().keys() == {"pixel_values", "sample_key"} | ({"labels"} if wanted else set())
    assert given.sample_key.tolist() == batch.sample_keys.tolist()
    assert not wanted or given.labels.tolist() == batch.labels.tolist()


EVERYTHING = Augmentation(
    crop="simple", vertical_flip=0.5, quarter_turns=True, rand_augment="rand-m9-n2-p1-mstd0.5-inc1", three_augment=True,
    color_jitter=(0.4, 0.4, 0.4, 0.1), steps=tuple(map(Step, STEPS)), erase=0.9, mixup=0.8, cutmix=1.0,
)  # fmt: skip


def test_everything_at_once_is_by_the_samples_key() -> None:
    """The same for a pair in any company; and evaluation has none of it."""
    augment = Augment(EVERYTHING, (24, 24), 3, "cpu", train=True, labels=True, num_labels=10)
    batch = a_batch(16)
    together = augment(batch)
    assert together.labels is not None
    assert together.labels.shape == (16, 10)
    for first in range(0, 16, 2):
        pair = augment(a_batch(16, ids=np.arange(first, first + 2)))
        torch.testing.assert_close(pair.pixel_values, together.pixel_values[first : first + 2], rtol=0, atol=1e-3)
        assert torch.equal(pair.labels, together.labels[first : first + 2])
    plain, evaluated = (
        Augment(section, (24, 24), 3, "cpu", train=False, labels=True)(batch)
        for section in (Augmentation(), EVERYTHING)
    )
    assert torch.equal(plain.pixel_values, evaluated.pixel_values)
    assert evaluated.labels is not None
    assert torch.equal(evaluated.labels, torch.from_numpy(batch.labels))


def test_vertical_flips_and_quarter_turns() -> None:
    section = Augmentation(flip=0.0, vertical_flip=0.3, mean=(0.0,), std=(1.0,))
    batch = a_batch(400)
    ours, plain = Augment(section, (9, 7), 3, "cpu", train=True)(batch).pixel_values, images_of(batch)
    same, mirrored = ((ours - other).abs().amax((1, 2, 3)) < 1e-4 for other in (plain, plain.flip(-2)))
    assert bool((same ^ mirrored).all())
    assert 0.2 < mirrored.double().mean() < 0.4
    section = Augmentation(flip=0.0, quarter_turns=True, mean=(0.0,), std=(1.0,))
    batch = a_batch(400, size=(8, 8))
    ours, plain = Augment(section, (8, 8), 3, "cpu", train=True)(batch).pixel_values, images_of(batch)
    turned = torch.stack([(ours - plain.rot90(k, (2, 3))).abs().amax((1, 2, 3)) < 1e-4 for k in range(4)])
    assert bool((turned.sum(0) == 1).all())
    assert turned.sum(1).min() > 70


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("section", [Augmentation(), EVERYTHING], ids=["plain", "everything"])
def test_nothing_is_read_back_from_the_device(train: bool, section: Augmentation) -> None:
    """As on a GPU: the batch's bytes and one buffer of parameters go there, and the host waits for nothing."""
    batch = a_batch(6)
    for name, range_ in (("heights", (5, 9)), ("widths", (4, 7))):
        setattr(batch, name, np.random.default_rng(0).integers(*range_, 6).astype(np.int32))
    batch.boxes = np.stack([0 * batch.heights, 0 * batch.widths, batch.heights, batch.widths], 1).astype(np.float32)
    augment = Augment(section, (16, 16), 3, "meta", train=train, labels=True, num_labels=10)
    with OneDevice() as mode, Uploads() as uploads, HostSyncs() as syncs:
        given = augment(batch)
    assert {what for *_, what in syncs.found} <= {"numpy"}, "but to fill memory of the host"
    assert mode.seen > 20
    assert uploads.count == 2
    assert {name: (value.device.type, value.dtype) for name, value in given.inputs().items()} == {
        "pixel_values": ("meta", torch.float32),
        "sample_key": ("meta", torch.int64),
        "labels": ("meta", torch.float32 if train and section is EVERYTHING else torch.int64),
    }
    assert given.pixel_values.shape == (6, 3, 16, 16)


class Uploads(TorchDispatchMode):
    """Counts copies from the CPU to the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy:
            self.count += args[0].device.type == "cpu" and result.device.type == "meta"
        return result


class Invert:
    """An operation from outside: the chosen samples upside down in value."""

    def draw(self, batch) -> dict[str, np.ndarray]:
        return {"inverted": batch.labels % 2 == 0}

    def apply(self, inputs, drawn, on_device):
        pixels, inverted = inputs.pixel_values, on_device["inverted"]
        return replace(inputs, pixel_values=torch.where(inverted[:, None, None, None], -pixels, pixels))


def test_one_more_operation_is_one_more_in_the_list() -> None:
    augment = Augment(Augmentation(), (9, 7), 3, "cpu", train=True)
    batch = a_batch(6)
    before = augment(batch).pixel_values
    augment.operations.append(Invert())
    after = augment(batch).pixel_values
    assert torch.equal(after[0::2], -before[0::2])
    assert torch.equal(after[1::2], before[1::2])


def test_upload_is_one_copy_of_aligned_arrays() -> None:
    random = np.random.default_rng(0)
    groups = [
        {"keys": random.integers(-(2**62), 2**62, 5), "flips": random.random(3) < 0.5},
        {},
        {"turned": random.random((4, 2)).T, "none": np.zeros(0, np.float32), "few": random.random((2, 3), np.float32)},
    ]
    uploaded = upload(groups, torch.device("cpu"))
    assert [group.keys() for group in uploaded] == [group.keys() for group in groups]
    tensors = {name: tensor for group in uploaded for name, tensor in group.items()}
    for name, array in (item for group in groups for item in group.items()):
        assert tensors[name].numpy().dtype == array.dtype
        assert np.array_equal(tensors[name].numpy(), array)
        assert tensors[name].storage_offset() * tensors[name].element_size() % 64 == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
