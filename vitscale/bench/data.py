"""`vitscale bench data`: from tar shards to crops, this project's loader beside others', in one run and in turns.

images: all give crops of 20 to 100% of the area of the same JPEGs, on the same cores; with a resize to 224 x 224 where
it says so (ours is flipped and normalized too). tar: samples read, nothing decoded. storage: the same shards from the
disk, and from servers on this machine through a cache; the servers work on the same cores. shards: what entering a new
shard adds to a batch.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitscale import rng
from vitscale.augment.pipeline import Augment
from vitscale.bench import storage
from vitscale.bench.data_peers import PACKAGES, RATIO, SCALE, WEBDATASET, Setting, peers
from vitscale.bench.laps import Batches, Start, lap_figures, run_laps
from vitscale.bench.photographs import QUALITY, SIZE, open_loader, photograph_shards
from vitscale.bench.rounds import benchmark_parser, report_sections, show
from vitscale.config.schema import Data, RunConfig, Train
from vitscale.data.crop import RandomCrop
from vitscale.data.index import ShardIndex
from vitscale.data.shards import Shards
from vitscale.files.decode import choose_decoder
from vitscale.files.header import read_header
from vitscale.files.tar import scan_shard
from vitscale.inference.command import above_zero

BARE = "nvImageCodec alone: the crops decoded"
WEBDATASET_TAR = "webdataset: samples in their order"
_SHARDS = 20  # of the section storage: most of them are entered after the first batch
_CHUNK = 8  # images that a thread of the bare decoder takes at once, as a reader's
_PACKAGES = PACKAGES | {"nvidia": "nvidia-nvimgcodec-cu12 nvidia-dali-cuda120"}
_RATES = {
    "{what}/s": "{per_second:.0f}",
    "laps": "{per_second_spread[0]:.0f} to {per_second_spread[1]:.0f}",
    "CPU ms": "{cpu_ms:.3f}",
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    options = _options(arguments)
    height, width = options.size
    distinct = max(16, 256 * SIZE[0] * SIZE[1] // max(height * width, SIZE[0] * SIZE[1]))
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as name:
        folder = Path(name)
        index = photograph_shards(folder / "shards", options.images, distinct, size=options.size)
        setting = Setting(folder / "shards", options.images, options.cores, options.batch)
        kilobytes = int(index.bytes.sum()) / index.total / 1000
        print(
            f"{width}x{height} JPEG q{QUALITY} of smooth noise, {kilobytes:.0f} kB a sample; {options.cores} cores, "
            f"median of {options.rounds} laps of {options.seconds:g} s in turns"
        )
        works: dict[str, Callable[[], dict[str, Any]]] = {
            "images": partial(_images, setting, index, options),
            "tar": partial(_tar, setting, index, options),
            "storage": partial(_sources, folder / "many", setting, options, distinct),
            "shards": partial(_new_shards, folder / "small", options),
        }
        sections = {name: work() for name, work in works.items() if name in options.sections}
    report_sections({"bench": "data", **vars(options)}, sections)
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = benchmark_parser("data", __doc__, rounds=3)
    cores = len(os.sched_getaffinity(0))
    sections = ("images", "tar", "storage", "shards")
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections, metavar="SECTION",
                        help=f"of {', '.join(sections)} (default: all)")  # fmt: skip
    parser.add_argument("--size", type=_size, default=SIZE, metavar="WxH", help="of the JPEGs (default: 500x375)")
    parser.add_argument("--images", type=above_zero, default=2000, help="in the shards (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a lap (default: %(default)s)")
    parser.add_argument("--cores", type=above_zero, default=cores, help="threads or workers (default: %(default)s)")
    parser.add_argument("--batch", type=above_zero, default=64, help="images, a multiple of 8 (default: %(default)s)")
    return parser.parse_args(arguments)


def _size(text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT"."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: must be WIDTHxHEIGHT, as 500x375")
    return int(match[2]), int(match[1])


def _images(setting: Setting, index: ShardIndex, options: argparse.Namespace) -> dict[str, Any]:
    decoders = dict.fromkeys([choose_decoder("auto"), "simplejpeg"])
    starts: dict[str, Start] = {
        **{f"vitscale ({name}): decode + crop": partial(_ours, setting, name) for name in decoders},
        "vitscale: decode + crop, our resize": partial(_ours, setting, "auto", resize=True),
        BARE: partial(_bare, setting, index),
        **peers(setting),
    }
    laps, left_out = run_laps(starts, options.seconds, options.rounds, _PACKAGES)
    result = {"contenders": lap_figures(laps, WEBDATASET, BARE), "left_out": left_out}
    columns = _rates("images") | ({"of the decoder": "{share:.2f}"} if BARE in laps else {})
    title = "\nimages: ratios to webdataset; the decoder has the files in memory, and as many threads"
    show(title, columns, result)
    return result


def _tar(setting: Setting, index: ShardIndex, options: argparse.Namespace) -> dict[str, Any]:
    starts = {
        "vitscale: samples by their places": partial(_read, setting, index, scan=False),
        "vitscale: headers scanned first": partial(_read, setting, index, scan=True),
        WEBDATASET_TAR: partial(_read_by_webdataset, setting),
    }
    laps, left_out = run_laps(starts, options.seconds, options.rounds, _PACKAGES)
    result = {"contenders": lap_figures(laps, WEBDATASET_TAR), "left_out": left_out}
    title = "\ntar: one thread reads images and labels, nothing is decoded; ratios to webdataset"
    show(title, _rates("samples"), result)
    return result


def _sources(folder: Path, setting: Setting, options: argparse.Namespace, distinct: int) -> dict[str, Any]:
    photograph_shards(folder, options.images, distinct, _SHARDS, options.size)
    contenders, left_out = storage.measure_sources(folder, setting.batch, options.rounds)
    title = (
        f"\nstorage: decode + crop, epochs of {_SHARDS} shards from their first batch on, servers on these cores; "
        "ratios to the disk"
    )
    result = {"contenders": contenders, "left_out": left_out}
    show(title, _rates("images"), result)
    return result


def _new_shards(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    found = storage.measure_new_shards(folder, options.images, options.batch, options.rounds)
    print(
        "\nshards: batches of {batch} of 1 kB, read in {ms_within:.2f} ms; {shards_entered} enter a shard of {images}, "
        "in {ms_entering:.2f} ms: at most {most_extra_ms:.2f} ms more".format(**vars(options), **found)
    )
    return found


def _rates(what: str) -> dict[str, str]:
    return {header.format(what=what): cell for header, cell in _RATES.items()}


def _config(setting: Setting, decoder: str = "auto") -> RunConfig:
    data = Data(lanes=8, decode=decoder, threads=setting.cores)
    return RunConfig(data=data, train=Train(global_batch=setting.batch, micro_batch=setting.batch))


def _ours(setting: Setting, decoder: str, resize: bool = False) -> Batches:
    """What a rank's CPU does where the device resizes; with `resize`, what it does without a GPU."""
    config = _config(setting, decoder)
    torch.set_num_threads(setting.cores)
    augment = Augment.of(config, "cpu", train=True)
    with open_loader(setting.folder, config) as loader:
        for batch in loader:
            if resize:
                augment(batch)
            loader.release(batch)
            yield len(batch)


def _bare(setting: Setting, index: ShardIndex) -> Batches:
    """The decoder that `auto` takes first, by its own calls, in threads with one decoder each."""
    codec = importlib.import_module("nvidia.nvimgcodec")
    mine = threading.local()
    params = codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB)

    def decode(part: list[tuple[bytes, list[int]]]) -> int:
        if not hasattr(mine, "decoder"):
            backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
            cpu = codec.NVIMGCODEC_DEVICE_CPU_ONLY
            mine.decoder = codec.Decoder(device_id=cpu, max_num_cpu_threads=1, backends=backends)
        streams = [codec.CodeStream(data).get_sub_code_stream(region=codec.Region(*box)) for data, box in part]
        return sum(np.asarray(image).ndim == 3 for image in mine.decoder.decode(streams, params=params))

    shards = Shards(index, "cls", index.total)
    files = [shards.read(place).image or b"" for place in range(min(256, int(index.samples[0])))]
    headers = [read_header(data, Data().max_pixels) for data in files]
    keys, sides = (
        rng.sample_key(0, 0, np.arange(len(files) * 16)),
        np.tile([header.oriented for header in headers], (16, 1)),
    )
    boxes = RandomCrop(SCALE, RATIO).boxes(keys, sides[:, 0], sides[:, 1]).tolist()
    crops = itertools.cycle(zip(files * 16, boxes, strict=True))
    waiting: deque[Future[int]] = deque()
    with ThreadPoolExecutor(setting.cores) as pool:
        while True:
            while len(waiting) < 4 * setting.cores:
                waiting.append(pool.submit(decode, list(itertools.islice(crops, _CHUNK))))
            yield waiting.popleft().result()


def _read(setting: Setting, index: ShardIndex, scan: bool) -> Batches:
    """Every sample of the shards, in their order; scan: as if no table was there."""
    while True:
        shards = Shards(index, "cls", index.total)
        for shard, count in enumerate(index.samples.tolist()):
            if scan:
                scan_shard(index.paths[shard], index.store, "cls")
            for first in range(0, count, setting.batch):
                batch = range(first, min(first + setting.batch, count))
                yield sum(shards.read(shard << 32 | place).label is not None for place in batch)


def _read_by_webdataset(setting: Setting) -> Batches:
    dataset = importlib.import_module("webdataset").WebDataset(setting.tars, shardshuffle=False, nodesplitter=None)
    samples = iter(dataset.repeat())
    while True:
        yield sum("cls" in sample for sample in itertools.islice(samples, setting.batch))
