"""`vitscale inspect MODEL`: its modules, its gradients, its attention."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitscale.errors import ConfigError, DataError
from vitscale.inference.command import takes_max_pixels, takes_model
from vitscale.run_folder import DONE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vitscale.inference.model import Loaded
    from vitscale.interop.image_processing import ViTImageProcessor
    from vitscale.models.vit import ViTPreTrainedModel

RANDOM_IMAGES = 8


def register(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `inspect`."""
    added = verb("inspect", inspect, "a model's modules, shapes, parameters, FLOPs; its gradients and attention")
    takes_model(added)
    added.add_argument("--depth", type=_levels, default=None, metavar="N", help="levels of the tree (default: all)")
    added.add_argument("--gradients", action="store_true", help="gradient norms by layer, of one backward of its loss")
    added.add_argument(
        "--images", nargs="+", default=None, metavar="IMAGES",
        help="for --gradients: files, folders, patterns, shards (default: 8 images of random numbers)",
    )  # fmt: skip
    added.add_argument(
        "--labels", nargs="+", type=float, default=None, metavar="LABEL",
        help="one an image, for --gradients (default: random)",
    )  # fmt: skip
    added.add_argument("--attention", default=None, metavar="IMAGE", help="draw where the model looks in this image")
    takes_max_pixels(added)
    added.add_argument(
        "--out", default=None, metavar="FOLDER",
        help="for gradients.png and IMAGE-attention.png (default: no gradients.png, attention in this folder)",
    )  # fmt: skip


def inspect(arguments: argparse.Namespace) -> int:
    """Print the tree, or what was asked for instead."""
    from vitscale.inference.model import load

    _check(arguments)
    runs_images = bool(arguments.images or arguments.attention)
    loaded = load(arguments.model, "cpu", runs_images, arguments.take)
    if arguments.gradients:
        _gradients(loaded, arguments)
    if arguments.attention:
        _attention(loaded, arguments)
    if not arguments.gradients and not arguments.attention:
        _tree(loaded.model, arguments.depth)
    return DONE


def _check(arguments: argparse.Namespace) -> None:
    """That no option goes unheard."""
    instead = arguments.gradients or arguments.attention
    if not arguments.gradients and (arguments.images or arguments.labels):
        raise ConfigError("--images and --labels are for --gradients; add it (--attention takes its image itself)")
    if instead and arguments.depth is not None:
        raise ConfigError(
            f"--depth {arguments.depth}: is for the tree, which --gradients and --attention leave out; ask for it alone"
        )
    if arguments.out and not instead:
        raise ConfigError(f"--out {arguments.out}: is for --gradients and --attention; add one, or leave it out")


def _levels(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 0 or more")
    return int(text)


def _tree(model: ViTPreTrainedModel, depth: int | None) -> None:
    from vitscale.inspection.tree import as_table, flop_unit, module_tree

    tree = module_tree(model)
    print(as_table(tree, depth))
    unit, name = flop_unit(tree)
    forward, training = (flops / unit for flops in (model.forward_flops(), model.flops_per_image()))
    print(f"{tree.total:,} parameters; of one image: {forward:,.4g} {name} forward, {training:,.4g} {name} in training")


def _gradients(loaded: Loaded, arguments: argparse.Namespace) -> None:
    import torch

    from vitscale.config.model_rules import pair
    from vitscale.inspection.gradients import as_table, draw, gradient_norms

    model = loaded.model
    if arguments.images:
        images = _images(loaded, arguments)
    else:
        shape = (RANDOM_IMAGES, model.config.num_channels, *pair(model.config.image_size))
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradients = gradient_norms(model, images, _labels(arguments.labels, model, len(images)))
    print(as_table(gradients))
    if arguments.out:
        path = _folder(arguments.out) / "gradients.png"
        draw(gradients, path, f"{arguments.model}, {len(images)} {'given' if arguments.images else 'random'} images")
        print(path)


def _images(loaded: Loaded, arguments: argparse.Namespace) -> Tensor:
    """All images that are named, as one batch; DataError for a bad one."""
    import torch

    from vitscale.inference.images import batches, find_images

    sources = find_images(arguments.images, sys.stdin.buffer)
    processor, channels = loaded.processor, loaded.model.config.num_channels
    read = list(batches(sources, processor, channels, 32, arguments.world.cores_per_rank, arguments.max_pixels))
    for entry in (entry for batch in read for entry in batch.entries):
        if entry.bad is not None:
            raise DataError(f"--images: {entry.name}: {entry.bad}; leave it out")
    if not read:
        raise DataError(f"--images {' '.join(arguments.images)}: no image is there")
    return torch.cat([batch.pixel_values for batch in read if batch.pixel_values is not None])


def _folder(out: str) -> Path:
    """The folder of --out, made where it is not there."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}; name a folder of yours") from None
    return Path(out)


def _labels(given: Sequence[float] | None, model: ViTPreTrainedModel, images: int) -> Tensor | None:
    """One label an image, by number; whole numbers are classes."""
    import torch

    if given is None:
        return None
    if len(given) != images:
        raise ConfigError(f"--labels: {len(given)} for {images} images; give one an image, by --images")
    labels = torch.tensor(given)
    classes = model.config.num_labels
    if classes == 1:
        return labels
    if not all(label.is_integer() and 0 <= label < classes for label in given):
        raise ConfigError(f"--labels {' '.join(f'{label:g}' for label in given)}: must be classes 0 to {classes - 1}")
    return labels.long()


def _attention(loaded: Loaded, arguments: argparse.Namespace) -> None:
    from vitscale.inference.images import find_images
    from vitscale.inspection.attention import attention_maps, draw
    from vitscale.interop.image_arrays import decode

    source, *others = find_images([arguments.attention], sys.stdin.buffer)
    if others:
        raise ConfigError(f"--attention {arguments.attention}: is {1 + len(others)} images; name one")
    try:
        data = source.read()
    except DataError as error:
        raise DataError(f"--attention {source.name}: {error}") from None
    processor = loaded.processor
    image = decode(data, loaded.model.config.num_channels, source.name, arguments.max_pixels)
    pixel_values = processor(image, return_tensors="pt", input_data_format="channels_last").pixel_values
    maps = attention_maps(loaded.model, pixel_values)
    path = _folder(arguments.out or ".") / f"{Path(arguments.attention).stem}-attention.png"
    aspect = None if processor.do_center_crop else image.shape[0] / image.shape[1]  # of all of it, maybe squeezed
    draw(maps, _as_seen(pixel_values[0], processor), path, aspect, f"{arguments.attention}, by {arguments.model}")
    print(path)


def _as_seen(pixel_values: Tensor, processor: ViTImageProcessor) -> np.ndarray:
    """What the processor made, [channels, height, width], as [height, width, channels] in [0, 1]."""
    import numpy as np

    pixels = pixel_values.numpy()
    if processor.do_normalize:
        pixels = pixels * np.reshape(processor.image_std, (-1, 1, 1)) + np.reshape(processor.image_mean, (-1, 1, 1))
    return pixels.clip(0, 1).transpose(1, 2, 0)
