"""Real shards and images for the tests of the data room."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitscale.data.index import ShardIndex, build_index


def pixels(seed: int, height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    """uint8 noise, smooth enough that JPEG keeps it recognisable."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, channels), dtype=np.uint8)
    planes = [np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC))
              for c in range(channels)]  # fmt: skip
    return np.stack(planes, axis=-1)


def encoded(
    image: np.ndarray | Image.Image, kind: str = "JPEG", orientation: int | None = None, **options: Any
) -> bytes:
    """An image file's bytes."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(seed: int, height: int = 24, width: int = 32) -> bytes:
    return encoded(pixels(seed, height, width), quality=90)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a byte of data: a bomb, for who trusts it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar by Python's tarfile."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: list[int], labels: bool = True) -> ShardIndex:
    """Shards of small photographs, each sample with its running number as label (mod 10)."""
    paths, number = [], 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            members.append((f"{number:06d}.jpg", photo(number, 16 + number % 7, 18 + number % 5)))
            if labels:
                members.append((f"{number:06d}.cls", str(number % 10).encode()))
            number += 1
        paths.append(str(write_tar(folder / f"s{shard:03d}.tar", members)))
    return build_index(paths)
