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
from vitscale.inference.images import Found, batches, find
from vitscale.inference.progress import Tally
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.models.configuration import ViTConfig
from vitscale.world import read_world

BATCH = 8
_SHARD = ".tar:"  # between a shard and a sample in an image's name


class Images:
    """What the command line names as images; every pass reads them again, in their order.

    The label of a shard's sample is its .cls member, by the name that classes.json beside the shard gives
    it; that of a file is the folder it lies in: a name of label2id, or the folder's place among all of them
    in sorted order, as `vitscale pack` counts.
    """

    def __init__(
        self, named: Sequence[str], key: str, processor: ViTImageProcessor, config: ViTConfig, *,
        labelled: bool = False, most: int | None = None,
    ) -> None:  # fmt: skip
        """key: the option that named them, for errors; most: take so many, evenly spread over all that are named.
        DataError where none of them is there, or labels are asked for and cannot be told."""
        if "-" in named:
            raise DataError(f"{key} -: images are read more than once, stdin is not; name files, folders or shards")
        found = list(find(named, sys.stdin.buffer))
        if not any(map(_is_there, found)):
            raise DataError(f"{key}: no image could be read ({found[0].name if found else 'nothing was named'})")
        self._label = _Labels(found, key, config) if labelled else None
        if most is not None and len(found) > most:
            found = [found[place * len(found) // most] for place in range(most)]
        self._found, self._key, self._processor, self._channels = found, key, processor, config.num_channels
        self._told = False

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Labelled]:
        """Batches of pixels and labels. Bad files are named on stderr, once; DataError where none is good."""
        tally = Tally(stream=io.StringIO() if self._told else sys.stderr)
        threads = read_world().cores_per_rank
        for batch in batches(self._found, self._processor, self._channels, BATCH, threads):
            tally.add(batch)
            if batch.pixel_values is not None:
                labels = None
                if self._label is not None:
                    labels = torch.tensor([self._label(name) for name in batch.names])
                yield batch.pixel_values, labels
        tally.close()
        self._told = True
        if not tally.good:
            raise DataError(f"{self._key}: no image could be read")


def _is_there(one: Found) -> bool:
    try:
        return bool(one.read())
    except DataError:
        return False


class _Labels:
    """An image's name -> its class."""

    def __init__(self, found: Sequence[Found], key: str, config: ViTConfig) -> None:
        self._config = config
        self._shards: dict[str, tuple[dict[str, bytes], list[str] | None]] = {}
        folders = sorted({Path(one.name).parent.name for one in found if _SHARD not in one.name})
        self._classes: dict[str, int] = config.label2id or {}
        if not self._classes.keys() >= set(folders):
            if len(folders) != config.num_labels:
                raise DataError(
                    f"{key}: the images lie in {len(folders)} folders ({', '.join(folders[:4])}...), the model has "
                    f"{config.num_labels} classes; --labelled wants a folder for each, named as in label2id or in order"
                )
            self._classes = {name: place for place, name in enumerate(folders)}

    def __call__(self, name: str) -> int:
        """DataError where it has none."""
        shard, dot_tar, sample = name.partition(_SHARD)
        if not dot_tar:
            return self._classes[Path(name).parent.name]
        path, count = f"{shard}.tar", self._config.num_labels
        if path not in self._shards:
            names = class_names([path]) if self._config.has_class_names else None
            self._shards[path] = _shard_labels(path), names
        labels, names = self._shards[path]
        text = labels.get(sample, b"").decode(errors="replace").strip()
        if not text.isdecimal() or int(text) >= count:
            raise DataError(
                f"{name}: its label (.cls) is {text or 'missing'}; --labelled wants a whole number below "
                f"num_labels={count}"
            )
        return int(text) if names is None else self._by_name(path, names, int(text))

    def _by_name(self, shard: str, names: Sequence[str], label: int) -> int:
        """A shard's label as the model counts: by its class's name."""
        name, label2id = names[label] if label < len(names) else None, self._config.label2id or {}
        if name not in label2id:
            raise DataError(
                f"{shard}: {CLASSES} beside it calls label {label} {name!r}, which is none of the model's label2id; "
                f"--labelled wants the model's classes, or shards without {CLASSES}, whose labels are taken as they are"
            )
        return label2id[name]


def _shard_labels(path: str) -> dict[str, bytes]:
    table = scan_shard(path)
    labels = {}
    with open(path, "rb") as stream:
        for place, sample in enumerate(table.keys):
            offset, count = table.members(place).get("cls", (0, 0))
            stream.seek(offset)
            labels[sample] = stream.read(min(count, 64))
    return labels
