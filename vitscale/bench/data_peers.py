"""Others' loaders on the images of `vitscale bench data`, each by its own interface as its documentation has it.

All give random crops of the same areas and shapes, resized by bicubic interpolation to the same size unless their names
say otherwise: webdataset, timm and mosaicml/streaming in worker processes, DALI and SPDL in threads.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vitscale.bench.laps import Batches, Start
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig

WEBDATASET = "webdataset + Pillow: decode, crop, resize"
# By the first name of the module that is missing.
PACKAGES = {
    "webdataset": "webdataset", "timm": "timm", "nvidia": "nvidia-dali-cuda120", "spdl": "spdl_io spdl_core",
    "streaming": "mosaicml-streaming",
}  # fmt: skip
_SECTION = RunConfig().augment
SCALE, RATIO = _SECTION.crop_scale, _SECTION.crop_ratio
HEIGHT, WIDTH = pair(RunConfig().model.image_size)


@dataclass(frozen=True)
class Setting:
    """What all contenders work on, and with."""

    folder: Path  # of the shards
    images: int  # in all shards
    cores: int  # threads or workers
    batch: int

    @property
    def tars(self) -> list[str]:
        return sorted(map(str, self.folder.glob("*.tar")))


def peers(setting: Setting) -> Mapping[str, Start]:
    """By name, what starts each."""
    return {
        WEBDATASET: partial(_webdataset, setting),
        "timm's loader: decode, crop, resize": partial(_timm, setting),
        "mosaicml/streaming + Pillow: decode, crop, resize": partial(_streaming, setting),
        "SPDL: decode, crop, resize": partial(_spdl, setting),
        "DALI CPU: decode + crop, resize": partial(_dali, setting, resize=True),
        "DALI CPU: decode + crop": partial(_dali, setting, resize=False),
    }


def _webdataset(setting: Setting) -> Batches:
    webdataset = importlib.import_module("webdataset")
    dataset = webdataset.WebDataset(setting.tars, shardshuffle=False, nodesplitter=None).repeat()
    crops = dataset.map(lambda sample: _pillow_crop(sample["jpg"]))
    for batch in DataLoader(crops, batch_size=setting.batch, num_workers=setting.cores):
        yield len(batch)


def _timm(setting: Setting) -> Batches:
    data = importlib.import_module("timm.data")
    first, last = (Path(setting.tars[place]).name[-10:-4] for place in (0, -1))
    split = f"{Path(setting.tars[0]).name[:-10]}{{{first}..{last}}}.tar"
    dataset = data.create_dataset(
        "wds/", root=str(setting.folder), split=split, is_training=True, batch_size=setting.batch,
        num_samples=setting.images,
    )  # fmt: skip
    loader = data.create_loader(
        dataset, (3, HEIGHT, WIDTH), setting.batch, is_training=True, scale=SCALE, ratio=RATIO, color_jitter=0.0,
        interpolation="bicubic", num_workers=setting.cores, device=torch.device("cpu"),
    )  # fmt: skip
    while True:
        for images, _ in loader:
            yield len(images)


def _streaming(setting: Setting) -> Batches:
    streaming = importlib.import_module("streaming")
    tarfile = importlib.import_module("webdataset").WebDataset

    class Crops(streaming.StreamingDataset):  # type: ignore[name-defined,misc]
        def __getitem__(self, place: int) -> np.ndarray:
            return _pillow_crop(super().__getitem__(place)["jpg"])

    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        with streaming.MDSWriter(out=folder, columns={"jpg": "bytes"}) as writer:
            for sample in tarfile(setting.tars, shardshuffle=False, nodesplitter=None):
                writer.write({"jpg": sample["jpg"]})
        dataset = Crops(local=folder, batch_size=setting.batch, shuffle=True)
        loader: DataLoader[Any] = DataLoader(dataset, setting.batch, num_workers=setting.cores, persistent_workers=True)
        while True:
            for batch in loader:
                yield len(batch)


def _spdl(setting: Setting) -> Batches:
    media, builder = importlib.import_module("spdl.io"), importlib.import_module("spdl.pipeline").PipelineBuilder

    def files() -> Iterator[bytes]:
        for path in itertools.cycle(setting.tars):
            with open(path, "rb") as stream:
                yield from (data for name, data in media.iter_tarfile(stream) if name.endswith(".jpg"))

    def decode(data: bytes) -> Any:
        packets = media.demux_image(data)
        top, left, bottom, right = _box(packets.height, packets.width)
        crop = f"crop={right - left}:{bottom - top}:{left}:{top}"
        scale = f"scale={WIDTH}:{HEIGHT}:flags=bicubic"
        return media.decode_packets(packets, filter_desc=f"{crop},{scale},format=pix_fmts=rgb24")

    decode(next(files()))  # fails here where there is no FFmpeg: the pipeline would go on without end
    pipeline = (
        builder()
        .add_source(files())
        .pipe(decode, concurrency=setting.cores)
        .aggregate(setting.batch)
        .pipe(lambda frames: media.to_numpy(media.convert_frames(frames)))
        .add_sink(3)
        .build(num_threads=setting.cores + 1)
    )
    with pipeline.auto_stop():
        for batch in pipeline:
            yield len(batch)


def _dali(setting: Setting, resize: bool) -> Batches:
    dali, fn = importlib.import_module("nvidia.dali"), importlib.import_module("nvidia.dali.fn")

    @dali.pipeline_def(batch_size=setting.batch, num_threads=setting.cores, device_id=None)
    def crops() -> Any:
        files = fn.readers.webdataset(paths=setting.tars, ext=["jpg"], random_shuffle=False)
        images = fn.decoders.image_random_crop(files, device="cpu", random_area=SCALE, random_aspect_ratio=RATIO)
        if resize:
            cubic = importlib.import_module("nvidia.dali.types").INTERP_CUBIC
            images = fn.resize(images, size=(HEIGHT, WIDTH), interp_type=cubic)
        return images

    pipeline = crops()
    pipeline.build()
    while True:
        (images,) = pipeline.run()
        yield len(images)


def _pillow_crop(data: bytes) -> np.ndarray:
    """torchvision's RandomResizedCrop with Pillow, as timm and MAE use it; uint8 (H, W, C)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, bottom, right = _box(image.height, image.width)
    return np.array(image.crop((left, top, right, bottom)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def _box(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) as torchvision's RandomResizedCrop draws them, but for its rare last resort."""
    while True:
        area = height * width * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            top, left = random.randint(0, height - tall), random.randint(0, width - wide)
            return top, left, top + tall, left + wide
