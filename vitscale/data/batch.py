"""What the data room hands to the rest: one micro-batch of one rank, as decoded, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Replacement:
    """A bad sample, and why another one of its block stands in its slot."""

    slot: int  # in the global batch
    shard: str
    key: str
    cause: str  # one of header.CAUSES
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}/{self.key} ({self.cause}: {self.reason})"


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank: ragged uint8 images and the boxes drawn in them.

    The memory of `pixels` is lent: valid until the loader's `release`.
    """

    pixels: np.ndarray  # uint8 [bytes], flat: image i is HWC at pixels[offsets[i] :][: h * w * c]
    offsets: np.ndarray  # int64 [n]
    heights: np.ndarray  # int32 [n], of what is stored: only a region of the image around its box
    widths: np.ndarray  # int32 [n]
    channels: int
    boxes: np.ndarray  # float32 [n, 4]: (top, left, bottom, right) in the stored region's pixels
    labels: np.ndarray  # int64 [n], a class, -1 where the sample has none; or float32 [n, num_labels]
    sample_ids: np.ndarray  # int64 [n]: shard << 32 | place in the shard
    sample_keys: np.ndarray  # int64 [n]: Refs.keys, what all of a sample's random choices are drawn from
    names: tuple[str, ...]  # "shard/key"
    repeats: np.ndarray  # int64 [n]: which view of the sample in its epoch; above 0 in what fills up an evaluation
    epochs: np.ndarray  # int64 [n]
    replaced: tuple[Replacement, ...]
    epoch: int = 0  # of the global batch: SampleOrder.epoch
    retries: int = 0  # reads that failed and were made again, since the micro-batch before

    def __len__(self) -> int:
        return len(self.sample_ids)

    def image(self, i: int) -> np.ndarray:
        """Image i as uint8 [height, width, channels], a view."""
        shape = (int(self.heights[i]), int(self.widths[i]), self.channels)
        start = int(self.offsets[i])
        return self.pixels[start : start + shape[0] * shape[1] * shape[2]].reshape(shape)
