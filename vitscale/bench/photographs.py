"""Images that cost a decoder what photographs do: made here, packed in shards, read by a rank's loader."""

from __future__ import annotations

import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig, Source
from vitscale.data.crop import training_crop
from vitscale.data.index import ShardIndex, open_index, store_of
from vitscale.data.loader import Loader
from vitscale.data.mixture import training_order
from vitscale.prepare.writer import ImageBytes, PackedSample, write_shards
from vitscale.world import World

SIZE = (375, 500)  # height, width
QUALITY = 90


def photograph(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    """A JPEG of `size` (height, width), about 60 kB at SIZE: smooth noise at four scales, and grain."""
    height, width = size
    draw = np.random.default_rng(seed)
    image = draw.normal(120, 4, (height, width, 1)).astype(np.float32).repeat(3, axis=2)
    for cells, contrast in ((8, 60), (24, 34), (72, 20), (180, 12)):
        noise = draw.normal(size=(3, cells * height // width, cells)).astype(np.float32)
        planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in noise]
        colour = np.stack([np.asarray(plane) for plane in planes], axis=-1)
        image += contrast * (0.7 * colour.mean(axis=-1, keepdims=True) + 0.3 * colour)
    stream = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def photograph_shards(
    folder: Path, images: int, distinct: int = 256, shards: int = 4, size: tuple[int, int] = SIZE
) -> ShardIndex:
    """Shards in `folder` with so many samples, of `distinct` images, with labels 0 to 9; made on all cores."""
    seeds = range(min(distinct, images))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")) as pool:
        files = list(pool.map(partial(photograph, size=size), seeds, chunksize=4))
    origins = [ImageBytes("jpg", data) for data in files]
    chosen = (origins[i % len(origins)] for i in range(images))
    samples = [PackedSample(f"{i:06d}", one, len(one.data), str(i % 10)) for i, one in enumerate(chosen)]
    return write_shards([samples[shard::shards] for shard in range(shards)], folder, "bench")


def open_loader(folder: Path, config: RunConfig, pattern: str | None = None, index: str | None = None) -> Loader:
    """A single rank's loader of the shards in `folder`, from the first batch on.

    pattern, index: where they are read from instead, by which index; `folder` keeps what cannot be kept there.
    """
    shards = open_index((Source(pattern or f"{folder}/*.tar"),), index, folder, store=store_of(config.data))
    size = pair(config.model.image_size)
    return Loader(
        index=shards,
        order=training_order(config, shards.samples, shards.sources),
        crop=training_crop(config.augment, size),
        data=config.data,
        num_channels=config.model.num_channels,
        seed=config.run.seed,
        world=World(),
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        start=0,
        image_size=size,
    )
