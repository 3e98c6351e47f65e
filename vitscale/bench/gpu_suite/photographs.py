"""The suite's images, JPEGs as large as photographs: as shards, and as a reader gives them."""

from __future__ import annotations

import os
from pathlib import Path

from vitscale.bench.gpu_suite.cases import Setting
from vitscale.bench.loader import photograph_shards
from vitscale.config.check import lanes
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig, Source
from vitscale.data.crop import RandomCrop
from vitscale.data.index import open_index
from vitscale.data.loader import Loader
from vitscale.data.order import Order
from vitscale.world import World


def photographs(setting: Setting) -> Path:
    """A folder of shards, made once a call: 20,000 JPEGs of 500x375, 256 distinct ones (on a CPU 256, 8 distinct)."""
    folder = setting.scratch / "photographs"
    if not folder.exists():
        draft = folder.with_name(f"photographs.{os.getpid()}")  # a process that is ended leaves no half of it
        images, distinct = (256, 8) if setting.tiny else (20_000, 256)
        photograph_shards(draft, images, distinct, shards=8)
        draft.rename(folder)
    return folder


def open_loader(folder: Path, config: RunConfig) -> Loader:
    """A rank's loader over those shards."""
    index = open_index((Source(f"{folder}/*.tar"),), None, folder)
    data, train = config.data, config.train
    return Loader(
        index=index,
        order=Order(index.samples, config.run.seed, train.global_batch, lanes(config), data.window),
        crop=RandomCrop(config.augment.crop_scale, config.augment.crop_ratio),
        data=data,
        num_channels=config.model.num_channels,
        seed=config.run.seed,
        world=World(),
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        start=0,
        image_size=pair(config.model.image_size),
    )
