"""`vitscale stats DATA`: what a data set holds. Sums are of whole numbers, so they do not depend on who adds first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from vitscale.config.schema import Data
from vitscale.data.labels import LabelReader
from vitscale.data.shards import RawSample
from vitscale.files.header import BadSample, Header
from vitscale.prepare.progress import Progress, in_order
from vitscale.prepare.samples import Samples, WholeImages, chosen
from vitscale.text import aligned, printable

_PART = 16  # samples that a thread takes at once
_EXAMPLES = 20  # broken samples that are named
_SHOWN = 10  # of them, and of the classes, on the terminal
_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_BANDS = {"P": 3, "PA": 4}  # of images that keep a palette


@dataclass
class Tally:
    """What was found in some samples."""

    images: int = 0
    broken: Counter[str] = field(default_factory=Counter)  # by cause
    examples: list[dict[str, str]] = field(default_factory=list)  # the first of them
    formats: Counter[str] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)  # of the files
    heights: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    bytes: int = 0
    sizes: Counter[int] = field(default_factory=Counter)  # bytes of a file, to three digits
    values: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))  # pixels by channel and value
    classes: Counter[int] = field(default_factory=Counter)
    vectors: Counter[int] = field(default_factory=Counter)  # labels of several numbers, by how many
    above_zero: Counter[int] = field(default_factory=Counter)  # of these numbers, by their place
    unlabelled: int = 0
    odd_labels: int = 0  # that are no class
    odd_label: str = ""  # the first of them

    @property
    def looked_at(self) -> int:
        return self.images + self.broken.total()

    def __iadd__(self, other: Tally) -> Tally:
        for item in fields(self):
            own, more = getattr(self, item.name), getattr(other, item.name)
            if isinstance(own, Counter):
                own.update(more)  # + would copy all that was counted before
            else:
                setattr(self, item.name, own or more if isinstance(own, str) else own + more)
        del self.examples[_EXAMPLES:]
        return self


def count(samples: Samples, data: Data, images: int | None, seed: int, threads: int) -> Tally:
    """Of all samples, or of so many `images` of them, the same ones each time; the same for any number of threads."""
    numbers, found = chosen(samples.total, images, seed), Tally()
    labels = LabelReader(required=True, names=tuple(samples.class_names or ()), path=data.label_path)
    look = partial(_look, samples, WholeImages(data), labels)
    with Progress("stats", "samples", len(numbers)) as progress:
        for tally in in_order(look, numbers, _PART, threads):
            found += tally
            progress.add(tally.looked_at)
    return found


def _look(samples: Samples, images: WholeImages, labels: LabelReader, numbers: Sequence[int]) -> Tally:
    tally = Tally()
    for number in numbers:
        raw = samples.read(number)
        _add_label(tally, raw, labels)
        try:
            header, pixels = images.decode(raw)
        except BadSample as bad:
            tally.broken[bad.cause] += 1
            tally.examples.append({"name": f"{raw.shard}/{raw.key}", "cause": bad.cause, "reason": bad.reason})
            continue
        _add_image(tally, raw, header, pixels)
    return tally


def _add_image(tally: Tally, raw: RawSample, header: Header, pixels: np.ndarray) -> None:
    size = raw.image_bytes
    kind = f"{header.kind}{', 16 bits' if header.mode.startswith('I') else ''}"
    height, width = header.oriented
    tally.images += 1
    tally.formats[kind] += 1
    tally.channels[header.components or _BANDS.get(header.mode, Image.getmodebands(header.mode))] += 1
    tally.heights[height] += 1
    tally.widths[width] += 1
    tally.bytes += size
    tally.sizes[round(size, 3 - len(str(size)))] += 1
    tally.values += np.array(Image.fromarray(pixels).histogram(), dtype=np.int64).reshape(3, 256)


def _add_label(tally: Tally, raw: RawSample, labels: LabelReader) -> None:
    if raw.label is None:
        tally.unlabelled += 1
        return
    numbers = _numbers(raw.label)
    if len(numbers) > 1:
        tally.vectors[len(numbers)] += 1
        tally.above_zero.update(place for place, number in enumerate(numbers) if number > 0)
        return
    try:
        label = labels.read(raw.label)
    except BadSample as bad:
        tally.odd_labels += 1
        tally.odd_label = tally.odd_label or f"{raw.shard}/{raw.key}: {bad.reason}"
        return
    assert isinstance(label, int)
    tally.classes[label] += 1


def _numbers(label: bytes) -> list[float]:
    """Those that a label consists of; none where it is something else."""
    try:
        return [float(word) for word in label.decode().replace(",", " ").split()]
    except ValueError:
        return []


def summary(found: Tally, samples: Samples) -> dict[str, Any]:
    """All that was found, for JSON. Means and deviations are of all pixels, in the units of augment.mean."""
    named = samples.class_names or ()
    return {
        "samples": samples.total,
        "looked_at": found.looked_at,
        "images": found.images,
        "bytes": found.bytes,
        "broken": dict(sorted(found.broken.items())),
        "examples": found.examples,
        **_moments(found),
        "height": _percentiles(found.heights),
        "width": _percentiles(found.widths),
        "file_bytes": _percentiles(found.sizes),
        "formats": dict(found.formats.most_common()),
        "channels": {str(channels): count for channels, count in found.channels.most_common()},
        "classes": {str(label): count for label, count in sorted(found.classes.items())},
        "class_names": {str(label): named[label] for label in sorted(found.classes) if label < len(named)},
        "vectors": {str(length): count for length, count in sorted(found.vectors.items())},
        "above_zero": {_name(named, place): count for place, count in sorted(found.above_zero.items())},
        "unlabelled": found.unlabelled,
        "odd_labels": found.odd_labels,
        "odd_label": found.odd_label,
    }


def _moments(found: Tally) -> dict[str, Any]:
    """Mean and deviation of every channel: one where all images are grey, else of red, green and blue."""
    channels, pixels = 1 if set(found.channels) == {1} else 3, int(found.values[0].sum())
    mean, std = [], []
    for counts in found.values[:channels].tolist() if pixels else ():
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        mean.append(total / (255 * pixels))
        std.append(math.sqrt(pixels * squares - total * total) / (255 * pixels))  # whole numbers up to the root
    return {"pixels": pixels, "mean": mean, "std": std}


def _percentiles(counts: Counter[int]) -> dict[str, int]:
    """The smallest values that so many percent do not exceed; 0 is the least, 100 the largest."""
    values = np.array(sorted(counts), dtype=np.int64)
    ends = np.cumsum([counts[value] for value in values.tolist()])
    ranks = [max(1, -(-int(ends[-1]) * percent // 100)) for percent in _PERCENTILES] if len(values) else []
    places = np.searchsorted(ends, ranks).tolist()
    return {str(percent): int(values[place]) for percent, place in zip(_PERCENTILES, places, strict=False)}


def _name(names: Sequence[str], place: int) -> str:
    return names[place] if place < len(names) else str(place)


def as_text(told: Mapping[str, Any], where: str, most_broken: float = 1.0) -> str:
    """The summary for a terminal, with the lines for a config. most_broken: data.max_bad_fraction."""
    looked, total, broken = told["looked_at"], told["samples"], told["broken"]
    of = "" if looked == total else f" (chosen by their hashes, of {total:,})"
    lines = [f"{looked:,} samples{of} in {where}: {told['images']:,} images, {told['bytes'] / 1e6:,.1f} MB"]
    bad, when = sum(broken.values()), "" if sum(broken.values()) > 3 else " at the fourth that it reads"
    over = (
        f", more than data.max_bad_fraction={most_broken:g}: a run would end{when}"
        if bad > most_broken * looked
        else ""
    )
    lines += [f"broken: {_counted(broken) or 'none'}{over}"]
    lines += [f"  {each['name']}: {each['cause']}: {each['reason']}" for each in told["examples"][:_SHOWN]]
    lines += [f"formats: {_counted(told['formats'])}", f"channels: {_counted(told['channels'], 'of ')}", _labels(told)]
    rows = [["percentile", *map(str, _PERCENTILES)]]
    for name in ("height", "width", "file_bytes"):
        rows.append([name, *(f"{value:,}" for value in told[name].values())])
    if told["images"]:
        lines += [aligned(rows, right=range(1, len(rows[0])))]
    text = "\n".join(printable(line) if "\n" not in line else line for line in lines)
    return text + _config_lines(told) if told["images"] else text


def _counted(counts: Mapping[str, int], before: str = "") -> str:
    return ", ".join(f"{count:,} {before}{name}" for name, count in counts.items())


def _labels(told: Mapping[str, Any]) -> str:
    counts, names = told["classes"], told["class_names"]
    most = dict(sorted(counts.items(), key=lambda item: -item[1])[:_SHOWN])
    shown = {label if names.get(label, label) == label else f"{label} {names[label]}": most[label] for label in most}
    said = [f"{len(counts):,} classes: {_counted(shown, 'of ')}"] if counts else []
    for length, count in told["vectors"].items():
        said.append(f"{count:,} of {length} numbers each (above 0: {_counted(told['above_zero'], 'of ') or 'none'})")
    said = said or ["none"]
    if len(counts) > len(shown):
        said[0] += f", and {len(counts) - len(shown):,} more, of which the rarest has {min(counts.values()):,}"
    if counts and told["unlabelled"]:
        said.append(f"{told['unlabelled']:,} samples have none")
    if told["odd_labels"]:
        said.append(f"{told['odd_labels']:,} are no class ({told['odd_label']})")
        if not counts:
            said.append("names become classes by a classes.json beside the shards, a list of them")
    return f"labels: {'; '.join(said)}"


def _config_lines(told: Mapping[str, Any]) -> str:
    mean, std = (", ".join(f"{value:.4f}" for value in told[name]) for name in ("mean", "std"))
    grey = "" if len(told["mean"]) == 3 else "model:\n  num_channels: 1\n"
    return f"\n\nfor a config:\n{grey}augment:\n  mean: [{mean}]\n  std: [{std}]"
