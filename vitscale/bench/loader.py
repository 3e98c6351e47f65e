"""`vitscale bench loader`: images a second of this project's loader beside webdataset + Pillow, in one run.

The images are made here: JPEGs of 500x375 at quality 90 of smooth noise with grain, about 55 kB each, which
cost a decoder what photographs of that size do. Each contestant gives crops of 20 to 100% of the area, on the
same cores, in turn and again, so that a noisy machine is as noisy for all. Start-up is not counted.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from vitscale.config.schema import Augment as AugmentConfig
from vitscale.config.schema import Data
from vitscale.data.batch import Batch
from vitscale.data.crop import RandomCrop
from vitscale.data.index import ShardIndex
from vitscale.data.loader import Loader
from vitscale.data.order import Order
from vitscale.data.pack import PackedSample, write_shards
from vitscale.files.decode import choose_decoder
from vitscale.world import World

SIZE = (375, 500)  # height, width
TARGET = 224
BATCH = 64
CROP = RandomCrop((0.2, 1.0), (0.75, 4 / 3))
_LANES = 8
Batches = Iterator[int]  # how many images each batch had


@dataclass(frozen=True)
class Contestant:
    name: str
    open: Callable[[], AbstractContextManager[Batches]]


@dataclass(frozen=True)
class Lap:
    images_per_second: float
    cpu_ms: float  # of all its processes, an image


def main(args: list[str]) -> int:
    options = _options(args)
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as folder:
        index = photograph_shards(Path(folder), options.images)
        contestants = _contestants(index, options.cores)
        laps: dict[str, list[Lap]] = {contestant.name: [] for contestant in contestants}
        for _ in range(options.rounds):
            for contestant in contestants:
                laps[contestant.name].append(_lap(contestant, options.seconds))
    _report(laps, index, options)
    return 0


def _options(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vitscale bench loader", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="in the shards (default: 2000)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a lap (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="laps of each contestant (default: 3)")
    available = len(os.sched_getaffinity(0))
    parser.add_argument("--cores", type=int, default=available, help=f"threads or workers (default: {available})")
    return parser.parse_args(args)


def photograph(seed: int) -> bytes:
    """A JPEG that is as much work as a photograph: noise at four scales and grain."""
    height, width = SIZE
    draw = np.random.default_rng(seed)
    image = draw.normal(120, 4, (height, width, 1)).astype(np.float32).repeat(3, axis=2)
    for cells, contrast in ((8, 60), (24, 34), (72, 20), (180, 12)):
        noise = draw.normal(size=(3, cells * height // width, cells)).astype(np.float32)
        planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in noise]
        colour = np.stack([np.asarray(plane) for plane in planes], axis=-1)
        image += contrast * (0.7 * colour.mean(axis=-1, keepdims=True) + 0.3 * colour)
    stream = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def photograph_shards(folder: Path, images: int, distinct: int = 256, shards: int = 4) -> ShardIndex:
    """Shards of so many samples, of which so many images are `distinct`, with labels 0 to 9; on all cores."""
    seeds, context = range(min(distinct, images)), multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
        made = list(pool.map(photograph, seeds, chunksize=8))
    samples = [PackedSample(f"{i:06d}", "jpg", made[i % len(made)], i % 10) for i in range(images)]
    return write_shards([samples[shard::shards] for shard in range(shards)], folder, "bench")


def _contestants(index: ShardIndex, cores: int) -> list[Contestant]:
    own = dict.fromkeys([choose_decoder("auto"), "simplejpeg"])
    return [
        *(Contestant(f"vitscale ({name}): decode + crop", partial(_ours, index, cores, name)) for name in own),
        Contestant("vitscale (auto): decode + crop + our resize", partial(_ours_resized, index, cores)),
        Contestant("webdataset + Pillow: decode + crop + resize", partial(_webdataset, index, cores)),
    ]


def _lap(contestant: Contestant, seconds: float) -> Lap:
    with contestant.open() as batches:
        for _ in range(8):  # past the start and what was read ahead
            next(batches)
        images, cpu, started = 0, _cpu_seconds(), time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            images += next(batches)
        return Lap(images / elapsed, (_cpu_seconds() - cpu) / images * 1000)


def _cpu_seconds() -> float:
    """CPU time of this process and the living ones below it."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


@contextmanager
def _loader(index: ShardIndex, cores: int, decoder: str) -> Iterator[Loader]:
    data = Data(decode=decoder, threads=cores)
    order = Order(index.samples, 0, BATCH, _LANES, data.window)
    with Loader(
        index=index, order=order, crop=CROP, data=data, num_channels=3, seed=0, world=World(), global_batch=BATCH,
        micro_batch=BATCH, start=0, image_size=(TARGET, TARGET),
    ) as loader:  # fmt: skip
        yield loader


@contextmanager
def _ours(index: ShardIndex, cores: int, decoder: str) -> Iterator[Batches]:
    """What a rank's CPU does where the device resizes."""
    with _loader(index, cores, decoder) as loader:
        yield _counted(loader, lambda batch: None)


@contextmanager
def _ours_resized(index: ShardIndex, cores: int) -> Iterator[Batches]:
    """With the resize on the same cores, as on a machine without a GPU."""
    import torch

    from vitscale.augment.pipeline import Augment

    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    augment = Augment(AugmentConfig(), (TARGET, TARGET), 3, "cpu", train=True)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        loader = stack.enter_context(_loader(index, cores, "auto"))
        yield _counted(loader, augment)


def _counted(loader: Loader, use: Callable[[Batch], Any]) -> Batches:
    for batch in loader:
        use(batch)
        loader.release(batch)
        yield len(batch)


@contextmanager
def _webdataset(index: ShardIndex, cores: int) -> Iterator[Batches]:
    """webdataset's usual pipeline in DataLoader workers, RandomResizedCrop with Pillow, uint8 out."""
    import webdataset
    from torch.utils.data import DataLoader

    dataset = webdataset.WebDataset(list(index.paths), shardshuffle=False, nodesplitter=None).repeat()
    batches = _lengths(DataLoader(dataset.map(_pillow_crop), batch_size=BATCH, num_workers=cores))
    yield batches
    batches.close()  # ends the workers


def _lengths(loader: Any) -> Generator[int, None, None]:
    for batch in loader:
        yield len(batch)


def _pillow_crop(sample: dict[str, Any]) -> np.ndarray:
    """torchvision's RandomResizedCrop with Pillow, as timm and MAE use it."""
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    key = np.array([int.from_bytes(os.urandom(8), "little", signed=True)])
    ((top, left, bottom, right),) = CROP.boxes(key, np.array([image.height]), np.array([image.width])).tolist()
    return np.array(image.crop((left, top, right, bottom)).resize((TARGET, TARGET), Image.Resampling.BICUBIC))


def _report(laps: dict[str, list[Lap]], index: ShardIndex, options: argparse.Namespace) -> None:
    """A table for people, then a JSON line a contestant."""
    peer = statistics.median(lap.images_per_second for lap in laps[list(laps)[-1]])
    kilobytes = int(index.bytes.sum()) / index.total / 1000
    print(f"{SIZE[1]}x{SIZE[0]} JPEG q90 of smooth noise, {kilobytes:.0f} kB a sample; {options.cores} cores, "
          f"median of {options.rounds} laps of {options.seconds:g} s")  # fmt: skip
    print(f"{'':46s}{'images/s':>10s}{'laps':>20s}{'CPU ms/image':>14s}{'ratio':>7s}")
    lines = []
    for name, its in laps.items():
        rate = statistics.median(lap.images_per_second for lap in its)
        cpu = statistics.median(lap.cpu_ms for lap in its)
        span = f"{min(lap.images_per_second for lap in its):.0f} to {max(lap.images_per_second for lap in its):.0f}"
        print(f"{name:46s}{rate:10.0f}{span:>20s}{cpu:14.2f}{rate / peer:7.2f}")
        lines.append({"name": name, "images_per_second": rate, "laps": [lap.images_per_second for lap in its],
                      "cpu_ms_per_image": cpu, "ratio_to_webdataset_pillow": rate / peer,
                      "cores": options.cores})  # fmt: skip
    for line in lines:
        print(json.dumps(line))
