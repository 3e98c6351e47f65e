"""Images of every kind that is read, whole and damaged in every way, from a seed."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image

from tests.data.makers import encoded, pixels, png_header

GOOD, BAD, ANY = "good", "bad", "any"  # what must become of an image: delivered, reported, one of both
HUGE = (65_535, 40_000, 30_000)  # of each side; more than the pixels that the tests allow, whatever the two


RGB, GREY = pixels(1, 40, 52), pixels(2, 40, 52, 1)
COLOUR, PALETTE = Image.fromarray(RGB), Image.fromarray(RGB).convert("P")
ALPHA = Image.fromarray(np.concatenate([RGB, GREY], axis=2))
DEEP = Image.fromarray(np.arange(40 * 52, dtype=np.uint16).reshape(40, 52) * 31)
FRAMES = {"save_all": True, "append_images": [Image.fromarray(pixels(seed, 40, 52)) for seed in (3, 4)], "duration": 40}
WHOLE: dict[str, Callable[[], bytes]] = {  # what every decoder must read; a kind says the format first
    "jpeg": lambda: encoded(RGB, quality=85),
    "jpeg progressive": lambda: encoded(RGB, progressive=True),
    "jpeg grey": lambda: encoded(GREY),
    "jpeg cmyk": lambda: encoded(COLOUR.convert("CMYK")),
    "jpeg turned": lambda: encoded(RGB, orientation=6, subsampling=0, restart_marker_blocks=2),
    "png": lambda: encoded(RGB, "PNG"),
    "png palette": lambda: encoded(PALETTE, "PNG", transparency=3),
    "png alpha": lambda: encoded(ALPHA, "PNG", orientation=5),
    "png bits": lambda: encoded(COLOUR.convert("1"), "PNG"),
    "png 16": lambda: encoded(DEEP, "PNG"),
    "png animated": lambda: encoded(RGB, "PNG", **FRAMES),
    "webp": lambda: encoded(RGB, "WEBP"),
    "webp lossless": lambda: encoded(ALPHA, "WEBP", lossless=True, orientation=8),
    "webp animated": lambda: encoded(RGB, "WEBP", **FRAMES),
    "tiff": lambda: encoded(RGB, "TIFF", orientation=3),
    "tiff lzw": lambda: encoded(RGB, "TIFF", compression="tiff_lzw"),
    "tiff deflate 16": lambda: encoded(DEEP, "TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": lambda: encoded(RGB, "TIFF", compression="jpeg"),
    "tiff cmyk": lambda: encoded(COLOUR.convert("CMYK"), "TIFF"),
    "tiff tiles": lambda: tiled_tiff(64),
    "bmp": lambda: encoded(RGB, "BMP"),
    "bmp palette": lambda: encoded(PALETTE, "BMP"),
    "gif": lambda: encoded(PALETTE, "GIF", interlace=True),
    "gif animated": lambda: encoded(RGB, "GIF", **FRAMES),
}
KINDS = tuple(WHOLE)


@functools.cache
def whole(kind: str) -> bytes:
    return WHOLE[kind]()


def draw(random: Random) -> tuple[str, str, bytes, str]:
    """(kind, what was done to it, the bytes, GOOD, BAD or ANY)."""
    kind = random.choice(KINDS)
    name, change = random.choice(list(CHANGES.items()))
    data, fate = change(random, kind, whole(kind))
    return kind, name, data, fate


def _untouched(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    return data, GOOD


def _cut(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    """Of a JPEG any cut is told; of others some decoders need not all of the file."""
    return data[: random.randrange(len(data))], BAD if kind.startswith("jpeg") else ANY


def _flipped(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    changed = bytearray(data)
    end = random.choice([64, 400, len(data)])  # headers more often than pixels
    for _ in range(random.choice([1, 1, 2, 5, 40])):
        changed[random.randrange(min(end, len(data)))] ^= 1 << random.randrange(8)
    return bytes(changed), ANY


def _spliced(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    """A piece left out, put in, doubled, or taken from an image of another kind."""
    at, count = random.randrange(len(data)), random.choice([1, 2, 8, 100])
    other = whole(random.choice(KINDS))
    piece = random.choice([b"", random.randbytes(count), data[at : at + 2 * count], other[at:], bytes(count)])
    return data[:at] + piece + data[at + random.choice([0, count, len(piece)]) :], ANY


def _chimera(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    """The beginning of one format, and then another image."""
    return data[: random.choice([4, 12, 26, 100])] + whole(random.choice(KINDS)), ANY


def _nothing(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    return random.choice([b"", b"<html></html>", b"{}", bytes(3000), data[:3], b"\xff\xd8\xff\xd9"]), BAD


def _enlarged(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    """A header that declares far more pixels than there are."""
    changed, size = bytearray(data), (random.choice(HUGE), random.choice(HUGE))
    if kind.startswith("png"):
        return png_header(*size), BAD
    if kind.startswith("jpeg"):
        at = next(data.index(marker) for marker in (b"\xff\xc0\0", b"\xff\xc2\0") if marker in data)
        changed[at + 5 : at + 9] = struct.pack(">HH", *size)
    elif kind.startswith("gif"):
        changed[6:10] = struct.pack("<HH", *size)
    elif kind.startswith("bmp"):
        changed[18:26] = struct.pack("<ii", size[0], random.choice([1, -1]) * size[1])
    elif kind.startswith("tiff"):
        for tag, side in ((256, size[0]), (257, size[1])):
            changed = with_tiff_tag(changed, tag, side)
    else:
        wide, tall = (min(side, 16_383) for side in size)
        at = data.find(b"VP8X")
        if at >= 0:
            changed[at + 12 : at + 18] = (wide - 1).to_bytes(3, "little") + (tall - 1).to_bytes(3, "little")
            return bytes(changed), ANY  # the frames in it say otherwise
        at = data.index(b"VP8 ") + 14
        changed[at : at + 4] = struct.pack("<HH", wide, tall)
    return bytes(changed), BAD


def _bomb(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    """Little that unpacks to much, or takes long."""
    return random.choice([(tiled_tiff(12_000), BAD), (many_scans(3_000), BAD), (zip_bomb(), ANY)])


def _remarked(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    """A PNG with texts that mean something to a decoder, or are large: it is judged by its pixels."""
    png = whole("png")
    at = random.choice([33, len(png) - 12])  # behind the header, or behind the pixels
    return png[:at] + random.choice(remarks()) + png[at:], GOOD


CHANGES: dict[str, Callable[[Random, str, bytes], tuple[bytes, str]]] = {
    "untouched": _untouched, "cut": _cut, "flipped": _flipped, "flipped again": _flipped, "spliced": _spliced,
    "chimera": _chimera, "nothing": _nothing, "enlarged": _enlarged, "bomb": _bomb, "remarked": _remarked,
}  # fmt: skip


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@functools.cache
def remarks() -> list[bytes]:
    """Chunks of a PNG that say nothing of its pixels."""
    return [
        chunk(b"tEXt", b"exif\0a text"),
        chunk(b"iTXt", b"exif\0\0\0\0\0a text"),
        chunk(b"tEXt", b"transparency\0a"),
        chunk(b"tEXt", b"gamma\0a"),
        chunk(b"tEXt", b"a wrong checksum\0b")[:-1] + b"?",
        chunk(b"eXIf", b"MM\0*"),
        chunk(b"acTL", b"\0\0\0\1"),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8 << 20))),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 << 20))),
    ]


@functools.cache
def zip_bomb() -> bytes:
    """A small PNG whose pixels unpack to 64 MB."""
    header = struct.pack(">IIBBBBB", 30, 30, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(64 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@functools.cache
def many_scans(count: int) -> bytes:
    """A progressive JPEG of 1000 x 1000 pixels whose last refinement comes again and again."""
    data = encoded(np.zeros((1000, 1000, 1), np.uint8), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


@functools.cache
def tiled_tiff(side: int) -> bytes:
    """40 x 40 grey pixels in one compressed tile of side x side."""
    packed = zlib.compress(bytes(side * side), 1)
    entries = [(256, 4, 40), (257, 4, 40), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, side),
               (323, 4, side), (324, 4, 8), (325, 4, len(packed))]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, kind, 1, value)
                                                           for tag, kind, value in entries) + bytes(4)  # fmt: skip
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory


def with_tiff_tag(data: bytearray, tag: int, value: int) -> bytearray:
    """A little-endian TIFF with another value of a tag of its first directory."""
    at = struct.unpack_from("<I", data, 4)[0]
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<HHII", data, entry, tag, 4, 1, value)
    return data


def make_all() -> None:
    """What is made once and kept."""
    for kind in KINDS:
        whole(kind)
    for make in (remarks, zip_bomb, functools.partial(many_scans, 3_000), functools.partial(tiled_tiff, 12_000)):
        make()
