"""Real images for calibration and comparison, with their labels where those are asked for."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vitscale.errors import DataError
from vitscale.export.agreement import Labelled
from vitscale.files.classes import CLASSES, class_names
from vitscale.files.tar import scan_shard
from vitscale.inference.images import ImageSource, batches, find_images
from vitscale.inference.progress import Tally
from vitscale.interop.image_arrays import MAX_PIXELS
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.models.configuration import ViTConfig
from vitscale.text import listed
from vitscale.world import World

BATCH = 8


class Images:
    """What the command line names as images; every pass reads them again, in their order.

    The label of a shard's sample is its .cls member, by the name that classes.json beside the shard gives
    it; that of a file is the folder it lies in: a name of label2id, or the folder's place among all of them
    in sorted order, as `vitscale pack` counts.
    """

    def __init__(
        self, named: Sequence[str], key: str, processor: ViTImageProcessor, config: ViTConfig, *,
        labelled: bool = False, most: int | None = None, max_pixels: int = MAX_PIXELS,
    ) -> None:  # fmt: skip
        """key: the option that named them, for errors; most: take so many, evenly spread over all that are named;
        max_pixels: a larger one is bad.

        DataError where none of them is there, or labels are asked for and cannot be told.
        """
        if "-" in named:
            raise DataError(f"{key} -: images are read more than once, stdin is not; name files, folders or shards")
        sources = list(find_images(named, sys.stdin.buffer))
        _require_one(sources, key)
        self._labels = _Labels(sources, key, config) if labelled else None
        if most is not None and len(sources) > most:
            sources = [sources[place * len(sources) // most] for place in range(most)]
        self._sources, self._key, self._processor, self._channels = sources, key, processor, config.num_channels
        self._max_pixels, self._bad_are_named = max_pixels, False

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[Labelled]:
        """Batches of pixels and labels. Bad files are named on stderr, once; DataError where none is good."""
        tally = Tally(stream=io.StringIO() if self._bad_are_named else sys.stderr)
        threads = World().cores_per_rank
        sources = {source.name: source for source in self._sources}
        for batch in batches(self._sources, self._processor, self._channels, BATCH, threads, self._max_pixels):
            tally.add(batch)
            if batch.pixel_values is not None:
                labels = None
                if self._labels is not None:
                    labels = torch.tensor([self._labels.label_of(sources[name]) for name in batch.names])
                yield batch.pixel_values, labels
        tally.close()
        self._bad_are_named = True
        if not tally.good:
            raise DataError(f"{self._key}: no image could be read")


def _require_one(sources: Sequence[ImageSource], key: str) -> None:
    reasons = []
    for source in sources:
        try:
            source.read()
            return
        except DataError as error:
            reasons.append(f"{source.name}: {error}")
    raise DataError(f"{key}: no image could be read ({reasons[0] if reasons else 'nothing was named'})")


class _Labels:
    """The classes of images, as the model counts them."""

    def __init__(self, sources: Sequence[ImageSource], key: str, config: ViTConfig) -> None:
        self._config = config
        self._shards: dict[Path, tuple[dict[str, bytes], list[str] | None]] = {}
        paths = {source.path for source in sources if source.path is not None and source.key is None}
        folders = sorted({_folder(path) for path in paths if path.is_file()})
        self._classes: dict[str, int] = config.label2id or {}
        if not self._classes.keys() >= set(folders):
            if len(folders) != config.num_labels:
                raise DataError(
                    f"{key}: the images lie in {len(folders)} folders ({listed(folders, limit=4)}), the model has "
                    f"{config.num_labels} classes; --labelled wants a folder for each, named as in label2id or in order"
                )
            self._classes = {name: place for place, name in enumerate(folders)}

    def label_of(self, source: ImageSource) -> int:
        """DataError where it has none."""
        assert source.path is not None, "stdin is refused, and what is not there is no good image"
        if source.key is None:
            return self._classes[_folder(source.path)]
        labels, names = self._of_shard(source.path)
        text, count = labels.get(source.key, b"").decode(errors="replace").strip(), self._config.num_labels
        if not text.isdecimal() or int(text) >= count:
            raise DataError(
                f"{source.name}: its label (.cls) is {text or 'missing'}; --labelled wants a whole number below "
                f"num_labels={count}"
            )
        return int(text) if names is None else self._by_name(source.path, names, int(text))

    def _of_shard(self, path: Path) -> tuple[dict[str, bytes], list[str] | None]:
        """The .cls members by their samples' keys, and the classes' names where both sides have them."""
        if path not in self._shards:
            table = scan_shard(str(path), label="cls")
            names = class_names([path]) if self._config.has_class_names else None
            self._shards[path] = {table.keys[place]: text for place, text in table.labels.items()}, names
        return self._shards[path]

    def _by_name(self, shard: Path, names: Sequence[str], label: int) -> int:
        """A shard's label as the model counts: by its class's name."""
        name, label2id = names[label] if label < len(names) else None, self._config.label2id or {}
        if name not in label2id:
            raise DataError(
                f"{shard}: {CLASSES} beside it calls label {label} {name!r}, which is none of the model's label2id; "
                f"--labelled wants the model's classes, or shards without {CLASSES}, whose labels are taken as they are"
            )
        return label2id[name]


def _folder(path: Path) -> str:
    """The name of the folder that a file lies in."""
    return path.absolute().parent.name
