"""The augmentation of a batch: decoded bytes in, the model's inputs on the device out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vitscale.augment.mix import Erase, Mix
from vitscale.augment.operations import (
    CropResize,
    Drawn,
    ModelInputs,
    Normalize,
    Operation,
    QuarterTurns,
    RaggedBatch,
    Shift,
)
from vitscale.augment.random_steps import RandomSteps, color_jitter, rand_augment, steps, three_augment
from vitscale.config import schema
from vitscale.config.augmentation import SHIFT, Augmentation, parse_rand_augment
from vitscale.config.model_rules import pair

_ALIGNMENT = 64  # bytes; what vectorized loads of any type want


class Augment:
    """Crop to the drawn box, resize, normalise; in training all that the section `augment` asks for.

    Every random choice is a hash of the sample's key and depends on nothing else. On a GPU a call only
    queues work on the current stream: the batch's bytes must stay until that work is done. image_size:
    (height, width); train: with what is random; labels: whether the inputs have the batch's labels, which are of
    num_labels classes where they are mixed.
    """

    def __init__(
        self,
        augment: Augmentation,
        image_size: tuple[int, int],
        num_channels: int,
        device: str,
        train: bool,
        labels: bool = False,
        num_labels: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self._labels = labels
        normalize = Normalize.of(augment.mean, augment.std, num_channels, device)
        self.operations: list[Operation] = [CropResize(image_size, num_channels, 0.0), normalize]
        if train:
            crop = CropResize(image_size, num_channels, augment.flip, augment.vertical_flip)
            fill = (255 * normalize.mean).round()  # as timm fills
            mixes = Mix(
                augment.mixup, augment.cutmix, augment.mix_probability, augment.mix_switch, image_size, num_labels
            )
            self.operations = [
                crop,
                *([Shift(SHIFT)] if augment.crop == "simple" else []),
                *([QuarterTurns()] if augment.quarter_turns else []),
                *_random_steps(augment, fill),
                normalize,
                *([Erase(augment.erase, image_size)] if augment.erase else []),
                *([mixes] if augment.mixup or augment.cutmix else []),
            ]

    @classmethod
    def of(cls, config: schema.RunConfig, device: str, train: bool) -> Augment:
        """A run's: in training with labels where the objective needs them."""
        labels = train and config.objective.needs_labels
        size, channels = pair(config.model.image_size), config.model.num_channels
        num_labels = config.model.num_labels
        return cls(config.augment, size, channels, device, train=train, labels=labels, num_labels=num_labels)

    @torch.no_grad()
    def __call__(self, batch: RaggedBatch) -> ModelInputs:
        """`pixel_values` float32 [n, channels, height, width]: (pixel / 255 - mean) / std."""
        of_samples = {"sample_key": batch.sample_keys} | ({"labels": batch.labels} if self._labels else {})
        drawn = [operation.draw(batch) for operation in self.operations]
        samples, *parameters = upload([of_samples, *drawn], self.device)
        pixels = torch.from_numpy(batch.pixels).to(self.device, non_blocking=True)
        inputs = ModelInputs(pixels, samples["sample_key"], samples.get("labels"))
        for operation, on_host, on_device in zip(self.operations, drawn, parameters, strict=True):
            inputs = operation.apply(inputs, on_host, on_device)
        return inputs


def _random_steps(augment: Augmentation, fill: Tensor) -> Iterator[RandomSteps]:
    if augment.rand_augment is not None:
        yield RandomSteps(rand_augment(parse_rand_augment(augment.rand_augment)), fill)
    if augment.three_augment:
        yield RandomSteps(three_augment, fill)
    if any(augment.color_jitter):
        yield RandomSteps(color_jitter(augment.color_jitter), fill)
    if augment.steps:
        widest = max((step.range[1] for step in augment.steps if step.name == "blur"), default=1.0)
        yield RandomSteps(steps(augment.steps), fill, blur_radius=math.ceil(3 * widest))


def upload(groups: Sequence[Drawn], device: torch.device) -> list[dict[str, Tensor]]:
    """The arrays of all groups on the device by one copy: views of one buffer, each at an aligned place."""
    arrays = [array for group in groups for array in group.values()]
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
    # torch reuses its pinned memory only once the copies from it are done.
    packed = torch.empty(starts.pop(), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, array in zip(starts, arrays, strict=True):
        packed.numpy()[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    buffer = packed.to(device, non_blocking=True)
    views = iter(
        buffer[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    )
    return [{name: next(views) for name in group} for group in groups]
