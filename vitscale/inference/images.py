"""What the command line names as images: found one after the other, read and decoded in threads, as batches."""

from __future__ import annotations

import glob
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import braceexpand
import numpy as np
import torch
from torch import Tensor

from vitscale.errors import DataError, VitscaleError
from vitscale.files.folder import HEAD, LeftOut, walk
from vitscale.files.header import FORMATS, IMAGE_KINDS, BadSample, image_kind, read_header
from vitscale.files.store import split_existing
from vitscale.files.tar import LARGEST_MEMBER, scan_shard
from vitscale.interop.image_arrays import MAX_PIXELS, decode
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.text import as_text, to_stderr

LARGE = 16_000_000  # pixels
_one_large_image = Lock()


@dataclass(frozen=True)
class ImageSource:
    """Something named as an image. What is wrong with it comes as a DataError when it is read."""

    name: str  # its path, SHARD:KEY within a shard, or - for stdin's bytes
    read: Callable[[], bytes]
    path: Path | None = None  # the file or shard that holds it; None for stdin's, and for what is not there
    key: str | None = None  # of a sample in a shard


@dataclass(frozen=True)
class Entry:
    """An image that was read, or why it could not be."""

    name: str
    bad: str | None = None


@dataclass(frozen=True)
class ImageBatch:
    """A stretch of the input, and the pixels of the images in it that are good."""

    entries: list[Entry]
    pixel_values: Tensor | None  # [good ones, channels, height, width]; None where there is none

    @property
    def names(self) -> list[str]:
        """Of the good ones."""
        return [entry.name for entry in self.entries if entry.bad is None]


def find_images(named: Sequence[str], stdin: BinaryIO) -> Iterator[ImageSource]:
    """Every image that the arguments name, in their order; folders and patterns sorted.

    An argument is a file, a .tar shard, a folder (searched with those below it for images and shards; stderr gets
    what was left out), or a pattern with *, ?, [], ** or {a..b}. `-` is stdin: the bytes of one image where they
    start like one, else a list with one argument a line.
    """
    for text in named:
        if text == "-":
            yield from _from_stdin(stdin)
        else:
            yield from _from_argument(text)


def batches(
    sources: Iterable[ImageSource],
    processor: ViTImageProcessor,
    channels: int,
    size: int,
    threads: int,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[ImageBatch]:
    """Images in the order of `sources`, `size` good ones a batch, decoded ahead in threads.

    channels: the model's; files are decoded to as many. Memory is that of some three batches, and of one image of
    max_pixels; a larger one is bad.
    """
    entries: list[Entry] = []
    good: list[np.ndarray] = []
    for one, done in _ahead(
        sources, partial(_load, processor=processor, channels=channels, max_pixels=max_pixels), threads, 2 * size
    ):
        if isinstance(done, np.ndarray):
            good.append(done)
        entries.append(Entry(one.name, done if isinstance(done, str) else None))
        if len(good) == size:
            yield ImageBatch(entries, torch.from_numpy(np.stack(good)))
            entries, good = [], []
    if entries:
        yield ImageBatch(entries, torch.from_numpy(np.stack(good)) if good else None)


def _ahead(
    sources: Iterable[ImageSource], work: Callable[[ImageSource], np.ndarray | str], threads: int, ahead: int
) -> Iterator[tuple[ImageSource, np.ndarray | str]]:
    """work(each) in threads, in order, at most `ahead` not yet taken."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    waiting: deque[tuple[ImageSource, Future[np.ndarray | str]]] = deque()
    rest = iter(sources)
    try:
        while True:
            for one in itertools.islice(rest, ahead - len(waiting)):
                waiting.append((one, pool.submit(work, one)))
            if not waiting:
                return
            one, future = waiting.popleft()
            yield one, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _load(one: ImageSource, processor: ViTImageProcessor, channels: int, max_pixels: int) -> np.ndarray | str:
    """[channels, height, width] as the model wants it, or why not: whatever one file raises, the others go on."""
    try:
        data = one.read()
        with _in_turn(data, max_pixels):
            array = decode(data, channels, one.name, max_pixels)
            return processor(array, return_tensors="np", input_data_format="channels_last").pixel_values[0]
    except VitscaleError as error:
        return str(error).removeprefix(f"{one.name}: ")
    except Exception as error:
        return f"cannot be used: {type(error).__name__}: {' '.join(str(error).split())}"


def _in_turn(data: bytes, max_pixels: int) -> AbstractContextManager[Any]:
    """Large images are decoded one at a time, so that as many as there are threads do not lie in memory at once."""
    try:
        header = read_header(data, max_pixels)
        return _one_large_image if header.height * header.width > LARGE else nullcontext()
    except BadSample:
        return nullcontext()  # `decode` says why


def _from_stdin(stdin: BinaryIO) -> Iterator[ImageSource]:
    head = stdin.read(HEAD)
    if image_kind(head) or head.startswith(b"\x93NUMPY"):
        yield ImageSource("-", lambda: head + stdin.read(LARGEST_MEMBER))
        return
    # Line by line: a list may be long, or still be written.
    first, *lines = (head + stdin.readline()).split(b"\n")
    for line in itertools.chain([first], lines, stdin):
        if text := os.fsdecode(line.rstrip(b"\r\n")):
            yield from _from_argument(text)


def _from_argument(text: str) -> Iterator[ImageSource]:
    if not text:
        yield _bad("''", "is an empty argument; is a variable unset?")
        return
    if "://" in text:
        yield _bad(text, "URLs are not read; download it, and name the file")
        return
    path = Path(text).expanduser()
    if os.path.lexists(path):
        yield from _from_path(path)
        return
    above, rest = split_existing(str(path))
    folder = Path(above)
    try:
        patterns = list(braceexpand.braceexpand(rest))
    except ValueError:  # braces that do not close are a name like any other
        patterns = [rest]
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, root_dir=folder, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            yield _bad(str(folder / pattern), "no file is named so; check the pattern")
        for match in matches:
            yield from _from_folder_entry(folder / match)


def _from_path(path: Path) -> Iterator[ImageSource]:
    if path.is_dir():
        yield from _from_folder(path)
    elif path.suffix.lower() == ".tar":
        yield from _from_shard(path)
    else:
        yield ImageSource(as_text(path), partial(_read, path), path)


def _from_folder_entry(path: Path) -> Iterator[ImageSource]:
    """What a search or a pattern found, and nobody named in full."""
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for
        yield _bad(as_text(path), "is no regular file")
    else:
        yield from _from_path(path)


def _from_folder(folder: Path) -> Iterator[ImageSource]:
    empty, left_out = True, LeftOut()
    for path in walk(folder, left_out, also=("tar",)):
        empty = False
        yield from _from_path(path)
    for path, reason in left_out.bad:
        empty = False
        yield _bad(as_text(path), reason)
    left_out.bad.clear()
    if empty:
        but = f"; left out: {left_out}" if str(left_out) else ""
        yield _bad(as_text(folder), f"holds no images ({', '.join(FORMATS)}) or shards (tar){but}")
    elif str(left_out):
        to_stderr(f"{as_text(folder)}: left out: {left_out}")


def _from_shard(path: Path) -> Iterator[ImageSource]:
    """The samples of a shard; one that is damaged anywhere is bad as a whole, as in training."""
    try:
        table = scan_shard(str(path))
    except DataError as error:
        yield _bad(as_text(path), str(error).removeprefix(f"{path}: "))
        return
    for place, key in enumerate(table.keys):
        name = f"{as_text(path)}:{key}"
        member = table.image_of(place)
        if member is None:
            yield _bad(name, f"has no image ({', '.join(IMAGE_KINDS)})")
        else:
            yield ImageSource(name, partial(_read, path, *member), path, key)


def _read(path: Path, offset: int = 0, count: int | None = None) -> bytes:
    """A file's bytes, or `count` of them from `offset` on."""
    try:
        with open(path, "rb") as stream:
            if offset:
                stream.seek(offset)
            data = stream.read(LARGEST_MEMBER + 1 if count is None else min(count, LARGEST_MEMBER + 1))
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > LARGEST_MEMBER:
        raise DataError(f"has more than {LARGEST_MEMBER >> 20} MiB")
    if count is not None and len(data) < count:
        raise DataError("its shard was cut while it was read")
    return data


def _bad(name: str, reason: str) -> ImageSource:
    def read() -> bytes:
        raise DataError(reason)

    return ImageSource(name, read)
