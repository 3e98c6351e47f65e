"""What data.train names, sample by sample and without an order: for the verbs that look at data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitscale import rng
from vitscale.config.schema import Data
from vitscale.data.index import open_index, store_of
from vitscale.data.shards import RawSample, Shards, header_of
from vitscale.errors import DataError
from vitscale.files.decode import Decoder, Job, choose_decoder
from vitscale.files.folder import LeftOut, class_folders, walk
from vitscale.files.header import FORMATS, Header
from vitscale.files.retry import unreadable
from vitscale.prepare.image_folder import folder_of
from vitscale.text import as_text


@dataclass(frozen=True, eq=False)
class Samples:
    """Shards, or a folder of images. `read` is for many threads at once."""

    total: int
    where: str  # "3 shards", for messages
    class_names: Sequence[str] | None
    read: Callable[[int], RawSample]  # by number, 0 to total - 1


def open_samples(data: Data, scratch: Path) -> Samples:
    """What data.train names. scratch: for index and tables of shards whose own folder cannot be written."""
    if (folder := folder_of(data.train)) is not None:
        return _of_folder(folder)
    label = data.label_extension
    index = open_index(data.train, data.index, scratch, label=label, image=data.image, store=store_of(data))
    shards = Shards(index, label, 4 * int(index.samples.max()))
    ends = np.cumsum(index.samples)

    def read(number: int) -> RawSample:
        shard = int(np.searchsorted(ends, number, side="right"))
        return shards.read(shard << 32 | number - int(ends[shard] - index.samples[shard]))

    return Samples(index.total, f"{len(index.names)} shards", index.class_names, read)


def _of_folder(folder: Path) -> Samples:
    """The images below a folder; the label is that of the class whose folder they are in."""
    left_out = LeftOut()
    paths = list(walk(folder, left_out))
    labels = {path.name: str(label).encode() for label, path in enumerate(class_folders(folder, left_out))}
    if not paths:
        below = sorted({path.parent.name for path in folder.glob("*/*.tar")})
        hint = f"; shards are below it: name {folder}/{below[0]}" if below else ""
        raise DataError(f"{folder}: holds neither shards (*.tar) nor images ({', '.join(FORMATS)}){hint}")

    def read(number: int) -> RawSample:
        path = paths[number]
        try:
            name, data = path.relative_to(folder), path.read_bytes()
        except OSError as error:
            raise unreadable(str(path), error) from None
        return RawSample(folder.name, as_text(name), data, len(data), labels.get(name.parts[0]))

    return Samples(len(paths), "a folder of images", [*map(as_text, labels)] or None, read)


def chosen(total: int, count: int | None, seed: int) -> Sequence[int]:
    """Numbers of `count` samples (None: all), ascending: one of each of `count` equal stretches, by its hash."""
    if count is None or count >= total:
        return range(total)
    bounds = np.arange(count + 1, dtype=np.int64) * total // count
    draws = rng.uniform(rng.fold(bounds[:-1], rng.key("chosen", seed)), "chosen", 1)[:, 0]
    return (bounds[:-1] + (draws * np.diff(bounds)).astype(np.int64)).tolist()


class WholeImages:
    """Decodes samples whole, at full scale, to RGB. For many threads at once."""

    def __init__(self, data: Data) -> None:
        self._max_pixels = data.max_pixels
        # At full scale all decoders give the same bits, and nvImageCodec would print a line for each bad image.
        name = "simplejpeg" if data.decode == "auto" else choose_decoder(data.decode)
        self._decoder = Decoder(name, 3, data.background, None)

    def decode(self, raw: RawSample) -> tuple[Header, np.ndarray]:
        """The header, and the pixels as they are to be seen, uint8 [height, width, 3]. BadSample says why not."""
        header = header_of(raw, self._max_pixels)
        region = self._decoder.region(header, (0, 0, *header.oriented))
        pixels = np.empty((*region.shape, 3), dtype=np.uint8)
        for bad in self._decoder.decode([Job(raw.image or b"", header, region, pixels)]):
            if bad is not None:
                raise bad
        return header, pixels
