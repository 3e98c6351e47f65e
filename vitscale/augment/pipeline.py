"""The augmentation of a batch: decoded bytes in, the model's inputs on the device out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitscale.augment.operations import CropResize, Drawn, ModelInputs, Normalize, Operation, RaggedBatch
from vitscale.config import schema
from vitscale.config.model_rules import pair

_ALIGNMENT = 64  # bytes; what vectorized loads of any type want


class Augment:
    """Crop to the drawn box, flip (in training), resize, normalise; labels pass through where `labels`.

    Every random choice is a hash of the sample's key and depends on nothing else. On a GPU a call only
    queues work on the current stream: the batch's bytes must stay until that work is done. image_size:
    (height, width); train: with flips; labels: whether the inputs have the batch's labels.
    """

    def __init__(
        self,
        augment: schema.Augment,
        image_size: tuple[int, int],
        num_channels: int,
        device: str,
        train: bool,
        labels: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self._labels = labels
        self.operations: list[Operation] = [
            CropResize(image_size, num_channels, augment.flip if train else 0.0),
            Normalize.of(augment.mean, augment.std, num_channels, device),
        ]

    @classmethod
    def of(cls, config: schema.RunConfig, device: str, train: bool) -> Augment:
        """A run's: in training with labels where the objective needs them."""
        labels = train and config.objective.needs_labels
        size, channels = pair(config.model.image_size), config.model.num_channels
        return cls(config.augment, size, channels, device, train=train, labels=labels)

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
