"""What an image file says of itself before it is decoded: size, EXIF orientation, kind; and the limits on it."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

from PIL import Image, UnidentifiedImageError

# Why a sample is bad; a closed set, since counts by cause are summed over ranks and runs.
CAUSES = ("no_image", "undecodable", "too_large", "channels", "label")
IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")  # extensions, without a dot
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # of a GIF or another animation the first frame
_SIZE_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_MOST_SCANS = 500  # of a progressive JPEG; each costs a pass over all blocks, and may take up a few bytes
_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}
_END = b"\xff\xd9"
_PNG = b"\x89PNG\r\n\x1a\n"
_STARTS = {b"\xff\xd8\xff": "jpg", _PNG: "png", b"II*\0": "tif", b"MM\0*": "tif"}
_TILE_SIDES = (322, 323)  # TIFF's tags: a tile's width and height


def image_kind(head: bytes) -> str | None:
    """The extension of the image whose first bytes these are, of FORMATS; None for anything else."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "bmp"
    if head[:6] in (b"GIF87a", b"GIF89a") and b"\0" in head[6:]:
        return "gif"
    return next((kind for start, kind in _STARTS.items() if head.startswith(start)), None)


class BadSample(Exception):
    """A sample that another one must stand in for; `cause` is one of CAUSES."""

    def __init__(self, cause: str, reason: str) -> None:
        assert cause in CAUSES
        super().__init__(f"{cause}: {reason}")
        self.cause, self.reason = cause, " ".join(reason.split())[:300]


@dataclass(frozen=True, eq=False)
class Header:
    """Size and kind of an image. Height and width are those in the file, before the orientation is applied."""

    height: int
    width: int
    orientation: int  # EXIF's, 1 to 8, still to be applied to what is decoded
    components: int  # of a JPEG; 0 for every other format
    kind: str = "JPEG"  # and mode: as Pillow has them
    mode: str = "RGB"

    @property
    def oriented(self) -> tuple[int, int]:
        """(height, width) as the picture is to be seen: orientations 5 to 8 lie on their side."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def read_header(data: bytes, max_pixels: int) -> Header:
    """The header of an encoded image. BadSample: undecodable, or too_large by its own account.

    Pillow's limit on pixels, which is the process's, is raised to max_pixels where it is lower.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit must not contradict one that was raised
    header = _jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else _other_header(data, max_pixels)
    if header.height < 1 or header.width < 1:
        raise BadSample("undecodable", f"its header says {header.width}x{header.height} pixels")
    if header.height * header.width > max_pixels:
        raise BadSample("too_large", f"{header.width}x{header.height} pixels, more than data.max_pixels={max_pixels}")
    return header


def _jpeg_header(data: bytes) -> Header:
    """Walk a JPEG's markers to its frame header. A file without an end marker is cut: decoders differ on those."""
    at, orientation = 2, 1
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _BARE_MARKERS:  # fill bytes and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        start, length = at + 4, int.from_bytes(data[at + 2 : at + 4], "big")
        at += 2 + length
        if length < 2 or marker in (0xD9, 0xDA):
            break
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0" and orientation == 1:
            orientation = exif_orientation(data[start + 6 : at])
        if marker in _SIZE_MARKERS and length >= 8:
            if data.rfind(_END, at) < 0:
                raise BadSample("undecodable", "JPEG without an end marker: it is cut")
            if marker in _PROGRESSIVE and data.count(b"\xff\xda", at) > _MOST_SCANS:
                raise BadSample("too_large", f"progressive JPEG of more than {_MOST_SCANS} scans")
            height, width, components = struct.unpack(">HHB", data[start + 1 : start + 6])
            return Header(height, width, orientation, components)
    raise BadSample("undecodable", "JPEG without a frame header")


def exif_orientation(tiff: bytes) -> int:
    """The orientation in an EXIF block (TIFF 6.0's first directory), 1 where it says nothing valid."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    at = struct.unpack_from(order + "I", tiff, 4)[0]
    count = struct.unpack_from(order + "H", tiff, at)[0] if at + 2 <= len(tiff) else 0
    for entry in range(at + 2, min(at + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, entry)
        if tag == 0x0112 and kind in (3, 4):  # SHORT, LONG
            value = struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, entry + 8)[0]
            return value if 1 <= value <= 8 else 1
    return 1


def _png_parts(data: bytes) -> tuple[bytes, bytes]:
    """A PNG of the chunks that make its pixels, and what its EXIF block holds.

    The others (texts, a profile) may be large or damaged, and say nothing here. W3C's PNG, section 5.4: an ancillary
    chunk's name begins with a small letter.
    """
    kept, exif, at = [_PNG], b"", len(_PNG)
    while at + 12 <= len(data):
        end, name = at + 12 + int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if name[:1].isupper() or name == b"tRNS":
            kept.append(data[at:end])
        elif name == b"eXIf":
            exif = data[at + 8 : end - 4]
        at = end
    return b"".join(kept), exif


def _why_none(data: bytes, error: Exception) -> str:
    if data[4:8] == b"ftyp":
        kind = "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC or another film's format"
        return f", but {kind}: convert it, to JPEG say"
    return "" if isinstance(error, UnidentifiedImageError) else f": {type(error).__name__}"


class Room:
    """Memory for images that are decoded whole: so many bytes at once, or one image of more."""

    def __init__(self, most: int) -> None:
        self._most, self._used, self._changes = most, 0, Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until there is room for `count` bytes, and hold it."""
        count = min(count, self._most)
        with self._changes:
            self._changes.wait_for(lambda: self._used + count <= self._most)
            self._used += count
        try:
            yield
        finally:
            with self._changes:
                self._used -= count
                self._changes.notify_all()


ROOM = Room(512 << 20)  # of this process
_CANVASES = 8  # bytes a pixel that Pillow holds of a WebP as soon as it is opened


def open_other(data: bytes) -> Image.Image:
    """What is no JPEG, by Pillow, which opens without decoding; to be closed and let go of soon."""
    return Image.open(io.BytesIO(_png_parts(data)[0] if data.startswith(_PNG) else data), formats=FORMATS)


def canvas_bytes(data: bytes) -> int:
    """What an image takes once it is opened: of a WebP by its header, which may lie; else next to nothing."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return _CANVASES * width * height


def _other_header(data: bytes, max_pixels: int) -> Header:
    """By Pillow; of a TIFF it applies the orientation itself."""
    with ROOM.taken(canvas_bytes(data)):
        return _header_by_pillow(data, max_pixels)


def _header_by_pillow(data: bytes, max_pixels: int) -> Header:
    exif = _png_parts(data)[1] if data.startswith(_PNG) else b""
    try:
        image = open_other(data)
        tile = math.prod(int(image.tag_v2.get(tag, 0)) for tag in _TILE_SIDES) if image.format == "TIFF" else 0
    except Image.DecompressionBombError as error:
        raise BadSample("too_large", str(error)) from None
    except Exception as error:  # its parsers raise nearly anything on damaged files
        if not data or data.lstrip()[:1] in (b"<", b"{"):
            raise BadSample("undecodable", "0 bytes" if not data else "a text, not an image") from None
        raise BadSample("undecodable", f"no {', '.join(FORMATS)} image{_why_none(data, error)}") from None
    if tile > max_pixels:  # which is decoded whole, however little of it the image shows
        raise BadSample("too_large", f"TIFF in tiles of {tile} pixels, more than data.max_pixels={max_pixels}")
    exif = exif or image.info.get("exif") or b""
    turn = exif_orientation(exif.removeprefix(b"Exif\0\0"))
    return Header(image.height, image.width, turn, 0, str(image.format), image.mode)
