"""`vitscale bench loader`: images a second of this project's loader beside webdataset + Pillow, in one run.

All give crops of 20 to 100% of the area of the same JPEGs, on the same cores, in turns. A lap begins once a
contender runs; its start is not counted.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vitscale.augment.pipeline import Augment
from vitscale.bench.photographs import QUALITY, SIZE, open_loader, photograph_shards
from vitscale.bench.rounds import benchmark_parser, figures, in_turns, report
from vitscale.config.model_rules import pair
from vitscale.config.schema import Data, RunConfig, Train
from vitscale.data.crop import RandomCrop
from vitscale.files.decode import choose_decoder
from vitscale.inference.command import above_zero

PEER = "webdataset + Pillow: decode + crop + resize"
BATCH = 64
CONFIG = RunConfig(data=Data(lanes=8), train=Train(global_batch=BATCH, micro_batch=BATCH))
CROP = RandomCrop(CONFIG.augment.crop_scale, CONFIG.augment.crop_ratio)
_WARM_UP = 8  # batches: past the start and what was read ahead
Batches = Generator[int, None, None]  # how many images each batch has; closing it ends its processes


@dataclass(frozen=True)
class Lap:
    seconds: float  # an image
    cpu_seconds: float  # an image, of all processes


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = benchmark_parser("loader", __doc__, rounds=3)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--images", type=above_zero, default=2000, help="in the shards (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a lap (default: %(default)s)")
    parser.add_argument("--cores", type=above_zero, default=cores, help="threads or workers (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.cores)  # of our resize
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as name:
        folder = Path(name)
        index = photograph_shards(folder, options.images)
        starts = _contenders(folder, options.cores)
        laps = in_turns({name: partial(_lap, start, options.seconds) for name, start in starts.items()}, options.rounds)
    contenders = figures({name: [lap.seconds for lap in own] for name, own in laps.items()}, PEER)
    for name, own in laps.items():
        rates = [1 / lap.seconds for lap in own]
        contenders[name] |= {
            "images_per_second": statistics.median(rates),
            "images_per_second_spread": [min(rates), max(rates)],
            "cpu_ms_per_image": statistics.median(lap.cpu_seconds for lap in own) * 1000,
        }
    kilobytes = int(index.bytes.sum()) / index.total / 1000
    title = (
        f"{SIZE[1]}x{SIZE[0]} JPEG q{QUALITY} of smooth noise, {kilobytes:.0f} kB a sample\n"
        f"{options.cores} cores, median of {options.rounds} laps of {options.seconds:g} s, ratios to webdataset"
    )
    columns = {
        "images/s": "{images_per_second:.0f}",
        "laps": "{images_per_second_spread[0]:.0f} to {images_per_second_spread[1]:.0f}",
        "CPU ms/image": "{cpu_ms_per_image:.2f}",
    }
    report(title, columns, {"bench": "loader", **vars(options), "contenders": contenders, "fastest_peer": PEER})
    return 0


def _contenders(folder: Path, cores: int) -> dict[str, Callable[[], Batches]]:
    decoders = dict.fromkeys([choose_decoder("auto"), "simplejpeg"])
    return {
        **{f"vitscale ({name}): decode + crop": partial(_ours, folder, cores, name) for name in decoders},
        "vitscale (auto): decode + crop + our resize": partial(_ours, folder, cores, "auto", resize=True),
        PEER: partial(_webdataset, folder, cores),
    }


def _lap(start: Callable[[], Batches], seconds: float) -> Lap:
    with contextlib.closing(start()) as batches:
        for _ in range(_WARM_UP):
            next(batches)
        images = 0
        cpu_before = _cpu_seconds()
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            images += next(batches)
        return Lap(elapsed / images, (_cpu_seconds() - cpu_before) / images)


def _cpu_seconds() -> float:
    """CPU time of this process and the living ones below it."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _ours(folder: Path, cores: int, decoder: str, resize: bool = False) -> Batches:
    """What a rank's CPU does where the device resizes; with `resize`, what it does without a GPU."""
    config = replace(CONFIG, data=replace(CONFIG.data, decode=decoder, threads=cores))
    augment = Augment.of(config, "cpu", train=True)
    with open_loader(folder, config) as loader:
        for batch in loader:
            if resize:
                augment(batch)
            loader.release(batch)
            yield len(batch)


def _webdataset(folder: Path, cores: int) -> Batches:
    """webdataset's usual pipeline in DataLoader workers, RandomResizedCrop with Pillow, uint8 out."""
    import webdataset

    dataset = webdataset.WebDataset(
        sorted(map(str, folder.glob("*.tar"))), shardshuffle=False, nodesplitter=None
    ).repeat()
    for batch in DataLoader(dataset.map(_pillow_crop), batch_size=BATCH, num_workers=cores):
        yield len(batch)


def _pillow_crop(sample: dict[str, Any]) -> np.ndarray:
    """torchvision's RandomResizedCrop with Pillow, as timm and MAE use it; uint8 (H, W, C)."""
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    key = np.array([int.from_bytes(os.urandom(8), "little", signed=True)])
    ((top, left, bottom, right),) = CROP.boxes(key, np.array([image.height]), np.array([image.width])).tolist()
    height, width = pair(CONFIG.model.image_size)
    return np.array(image.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.BICUBIC))
