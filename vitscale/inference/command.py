"""The verbs `predict` and `features`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from vitscale.run_folder import BAD_INPUT, STOPPED
from vitscale.text import above_zero

_IMAGES = (
    "files, folders (searched for images and shards), 'patterns' with *, ** or {a..b}, .tar shards, "
    "or - for stdin: one image's bytes, or a list with a path a line"
)
_CODES = (
    "A bad image is named on stderr and skipped. Exit codes: 0 every image was read, 1 some were skipped, "
    "2 none could be read, or the command cannot be done, 3 features were stopped by Ctrl-C."
)


def register(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs."""
    added = verb("predict", _predict, "the labels of images, with their probabilities")
    _takes_images(added)
    added.add_argument("--top-k", type=above_zero, default=5, metavar="K", help="labels an image (default: 5)")
    added.add_argument(
        "--format", choices=("table", "jsonl", "csv"), default=None, help="(default: as --out ends, else table)"
    )
    added.add_argument("--out", default=None, metavar="FILE", help="appears once all is done (default: stdout)")
    added = verb("features", _features, "an encoder's features of images, into shards")
    _takes_images(added)
    added.add_argument(
        "--out", required=True, metavar="FOLDER", help="new, or begun by the same command, which then goes on"
    )
    added.add_argument(
        "--pool", choices=("cls", "mean", "patch"), default="cls", help="class token, mean of the patch tokens, "
        "or every patch token (default: cls)"
    )  # fmt: skip
    added.add_argument("--format", choices=("npy", "parquet"), default="npy", help="(default: npy)")
    added.add_argument(
        "--shard-size", type=above_zero, default=None, metavar="N", help="images a shard (default: 256 MiB of them)"
    )


def _takes_images(added: argparse.ArgumentParser) -> None:
    added.epilog = _CODES
    takes_model(added)
    added.add_argument("images", metavar="IMAGES", nargs="+", help=_IMAGES)
    added.add_argument("--batch", type=above_zero, default=32, metavar="N", help="images at once (default: 32)")
    takes_max_pixels(added)
    added.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps (default: the GPU where there is one)")


def takes_model(added: argparse.ArgumentParser) -> None:
    """The arguments of a verb that opens one model."""
    added.add_argument("model", metavar="MODEL", help="a run's or a model's folder, a file of weights, or a hub name")
    takes_set(added)


def takes_set(added: argparse.ArgumentParser) -> None:
    """The option of every verb that opens files of weights."""
    text = "which set of weights of a file that has several, such as teacher or student"
    added.add_argument("--take", metavar="NAME", default=None, help=text)


def takes_max_pixels(added: argparse.ArgumentParser) -> None:
    """The option of every verb that reads images."""
    text = "an image of more pixels is bad, and not decoded (default: 64000000)"
    added.add_argument("--max-pixels", type=above_zero, default=64_000_000, metavar="N", help=text)


def _predict(arguments: argparse.Namespace) -> int:
    from vitscale.inference.images import batches, find_images
    from vitscale.inference.model import load
    from vitscale.inference.predict import Predictor, predict_all
    from vitscale.inference.progress import Tally

    loaded = load(arguments.model, arguments.device, take=arguments.take)
    predictor = Predictor(loaded, arguments.top_k)
    out = Path(arguments.out) if arguments.out else None
    tally = Tally(shows_count=out is not None or not sys.stdout.isatty())  # rows on a terminal show enough
    sources = find_images(arguments.images, sys.stdin.buffer)
    channels, threads = loaded.model.config.num_channels, arguments.world.cores_per_rank
    read = batches(sources, loaded.processor, channels, arguments.batch, threads, arguments.max_pixels)
    ending = out.suffix.removeprefix(".") if out else ""
    file_format = arguments.format or (ending if ending in ("jsonl", "csv") else "table")
    predict_all(predictor, read, file_format, out, tally)
    return tally.exit_code()


def _features(arguments: argparse.Namespace) -> int:
    from vitscale.inference.features import write_features
    from vitscale.inference.images import find_images
    from vitscale.inference.model import load
    from vitscale.inference.progress import Tally

    loaded = load(arguments.model, arguments.device, take=arguments.take)
    tally = Tally()
    try:
        folder = write_features(
            loaded,
            find_images(arguments.images, sys.stdin.buffer),
            Path(arguments.out),
            tally,
            pool=arguments.pool,
            file_format=arguments.format,
            shard_size=arguments.shard_size,
            batch=arguments.batch,
            threads=arguments.world.cores_per_rank,
            max_pixels=arguments.max_pixels,
        )
    except KeyboardInterrupt:
        tally.say(f"stopped; the same command goes on behind the last whole shard in {arguments.out}")
        return STOPPED
    code = tally.exit_code()
    if code != BAD_INPUT:
        print(f"{folder.path}: features of {folder.images} images in {folder.shards} shards")
    return code
