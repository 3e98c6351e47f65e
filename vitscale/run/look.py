"""`vitscale look`: the images of a data set as they lie there, or those of a step as the model gets them."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitscale.augment.feed import DeviceFeed, FedBatch
from vitscale.augment.pipeline import Augment
from vitscale.config.check import check_config, grid, mask_patch
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig, Train
from vitscale.config.step import choices
from vitscale.data.index import store_of
from vitscale.data.labels import LabelReader
from vitscale.evaluation.figures import draw_sheet, in_pixels, seen
from vitscale.files.header import BadSample
from vitscale.models.masking import cell_masking, mask_noise, random_masking
from vitscale.prepare.samples import Samples, WholeImages, chosen, open_samples
from vitscale.run.training_data import named_classes, order_over, sides_of, training_index, training_loader
from vitscale.run_folder import RunFolder
from vitscale.text import printable, to_stderr
from vitscale.world import World

_LARGEST = 320  # pixels of a side on the sheet
_WIDTH = 26  # characters of a line of a caption


@dataclass(frozen=True)
class Sheet:
    """Images, what stands below each, and what they are: see draw_sheet."""

    panels: dict[str, list[np.ndarray]]
    captions: list[str]
    title: str

    def draw(self, out: Path) -> None:
        draw_sheet(self.panels, self.captions, out, self.title)


def raw_samples(config: RunConfig, images: int) -> Sheet:
    """Some samples of data.train, chosen by their hashes, whole, with key and label; bad ones as a blank."""
    with tempfile.TemporaryDirectory() as scratch:
        samples = open_samples(config.data, Path(scratch))
        numbers = chosen(samples.total, images, config.run.seed)
        whole = WholeImages(config.data)
        labels = LabelReader(names=tuple(samples.class_names or ()), path=config.data.label_path)
        shown = [_sample(samples, number, whole, labels) for number in numbers]
    title = f"{len(numbers)} of {samples.total:,} samples in {samples.where}"
    return Sheet({"image": [image for image, _ in shown]}, [caption for _, caption in shown], title)


def _sample(samples: Samples, number: int, whole: WholeImages, labels: LabelReader) -> tuple[np.ndarray, str]:
    """A sample's image, made small, and its caption."""
    raw = samples.read(number)
    try:
        _, pixels = whole.decode(raw)
        height, width = pixels.shape[:2]
        image = Image.fromarray(pixels)
        image.thumbnail((_LARGEST, _LARGEST))
        said = f"{width} x {height}\n{_of_class(labels.read(raw.label), samples.class_names)}"
    except BadSample as bad:
        image, said = Image.new("RGB", (64, 64), "white"), str(bad)
    return np.asarray(image) / 255, _caption(f"{raw.shard}/{raw.key}", said)


def images_of_step(config: RunConfig, step: int, images: int, world: World) -> Sheet:
    """The first images of a step's global batch as the model gets them, with key and label; of an objective that hides
    patches also what it leaves to see. step: as in metrics.jsonl, from 1 on."""
    config = _by_usual_parts(config)
    micro_batches = max(1, config.train.global_batch // config.train.micro_batch)
    check_config(config, World(world_size=micro_batches))
    device = torch.device(world.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder.at(config.run.dir, config.run.name)  # with tables, where the run has begun
        folder = folder if folder.path.is_dir() else RunFolder(Path(scratch))
        index = training_index(config, folder, store_of(config.data))
        config = named_classes(config, index.class_names) if config.objective.needs_labels else config
        sides = sides_of(config, index)
        order = order_over(config, index, sides and sides[0], folder.skipped_batches())
        config = replace(config, data=replace(config.data, prefetch=2))
        loader = training_loader(config, index, order, world, (step - 1) * config.train.global_batch)
        batches = min(micro_batches, -(-images // config.train.micro_batch))
        with loader, DeviceFeed(loader, Augment.of(config, world.device, train=True), device) as feed:
            fed = [next(feed) for _ in range(batches)]
    for replaced in (each for batch in fed for each in batch.replaced):
        to_stderr(f"another sample stands in for {replaced}")
    names = [name for batch in fed for name in batch.names][:images]
    labels = [label for batch in fed for label in _labels(batch, config)][:images]
    batch = config.train.global_batch
    title = f"step {step} of {config.run.name}: {len(names)} of {batch} images, epoch {fed[0].epoch}"
    captions = [_caption(name, label) for name, label in zip(names, labels, strict=True)]
    return Sheet(_panels(config, fed, images), captions, title)


def _by_usual_parts(config: RunConfig) -> RunConfig:
    """The config, with a micro-batch of the schema's size at most where it is auto: the images are the same by any."""
    able, usual = choices(config, World()), Train().micro_batch
    return max(able, key=lambda each: (each.train.micro_batch <= usual, each.train.micro_batch))


def _panels(config: RunConfig, fed: Sequence[FedBatch], images: int) -> dict[str, list[np.ndarray]]:
    pixel_values, keys = (torch.cat([batch.inputs[name] for batch in fed])[:images].cpu()
                          for name in ("pixel_values", "sample_key"))  # fmt: skip
    pictures = seen(pixel_values, config.augment.mean, config.augment.std)
    panels = {"augmented": pictures}
    hidden = hidden_patches(config, keys)
    if hidden is not None:
        where = in_pixels(hidden, grid(config.model), pair(config.model.patch_size))
        panels["left to see"] = pictures.masked_fill(where, float("nan"))
    return {name: list(each.permute(0, 2, 3, 1).numpy()) for name, each in panels.items()}


def hidden_patches(config: RunConfig, sample_key: Tensor) -> Tensor | None:
    """Bool [n, patches]: what the objective hides of these samples; None for one that hides nothing."""
    objective, (rows, columns) = config.objective, grid(config.model)
    if objective.name == "mae":
        return random_masking(mask_noise(sample_key, rows * columns), objective.mae.mask_ratio)[1] > 0
    if objective.name in ("simmim", "multitask"):
        return cell_masking(sample_key, (rows, columns), mask_patch(config), objective.simmim.mask_ratio)
    return None


def _labels(batch: FedBatch, config: RunConfig) -> list[str]:
    """What stands below each image."""
    labels = batch.inputs.get("labels")
    if labels is None:
        return [""] * len(batch.names)
    names = config.model.id2label
    if labels.ndim == 1:
        return [_of_class(label, names) for label in labels.tolist()]
    if labels.shape[1] == 1:
        return [f"{label:.4g}" for label in labels[:, 0].tolist()]
    return [_mixed(row, names) for row in labels.tolist()]


def _mixed(shares: list[float], names: Sequence[str] | None) -> str:
    """The largest shares of a label that is several classes, a line each."""
    largest = sorted(((share, number) for number, share in enumerate(shares) if share), reverse=True)[:3]
    return "\n".join(f"{share:.3f} of {_named(number, names)}" for share, number in largest)


def _of_class(label: object, names: Sequence[str] | None) -> str:
    return f"label {_named(label, names)}" if isinstance(label, int) and label >= 0 else ""


def _named(label: int, names: Sequence[str] | None) -> str:
    name = names[label] if names and label < len(names) else str(label)
    return name if name == str(label) else f"{label} {name}"


def _caption(name: str, below: str) -> str:
    """A line for the name, its middle left out where it is long, and some for what follows."""
    name = printable(name)
    name = name if len(name) <= _WIDTH else f"{name[:6]}…{name[7 - _WIDTH :]}"
    lines = (textwrap.wrap(printable(line), _WIDTH)[:4] for line in below.split("\n"))
    return "\n".join([name, *chain.from_iterable(lines)])
