"""Encoded bytes -> uint8 pixels of the region that a crop box needs.

JPEGs of one or three components go to nvImageCodec (decodes the box alone, at full scale) or to
simplejpeg (decodes the whole at the smallest DCT scale that still covers the target), everything else
to Pillow, and so does what is four times its target or more, which is kept at a half, a quarter, ... of its scale, by
DCT where it is a JPEG. At full scale all three give the same bits: they are one libjpeg-turbo.
"""

from __future__ import annotations

import importlib.util
import io
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vitscale.errors import DataError
from vitscale.files.header import ROOM, BadSample, Header, canvas_bytes, open_other

Box = tuple[float, float, float, float]  # top, left, bottom, right
_PACKAGES = {"nvimgcodec": "nvidia.nvimgcodec", "simplejpeg": "simplejpeg"}
_WHEELS = {"nvimgcodec": "nvidia-nvimgcodec-cu12", "simplejpeg": "simplejpeg"}
_BYTES_A_PIXEL = 8  # of an image that Pillow has decoded, and a part of it as an array
# EXIF orientation -> (flip rows, flip columns, then swap the axes): from the file to the picture.
_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}


def choose_decoder(name: str) -> str:
    """data.decode as what will decode: `auto` is the first of nvimgcodec, simplejpeg, pillow that is installed."""
    installed = [key for key, package in _PACKAGES.items() if _is_installed(package)]
    if name == "auto":
        return next(iter(installed), "pillow")
    if name != "pillow" and name not in installed:
        raise DataError(f"data.decode={name}: is not installed: pip install {_WHEELS[name]}, or set data.decode=auto")
    return name


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is not there
        return False


@dataclass(frozen=True)
class Region:
    """What is decoded of an image and kept: rows and columns of the file's image at 1 / `divisor` of its scale."""

    top: int
    left: int
    bottom: int
    right: int
    divisor: int  # a power of two
    shape: tuple[int, int]  # (height, width) of the region as oriented: what is stored
    box: Box  # the drawn box in the stored region's pixels


@dataclass(frozen=True, eq=False)
class Job:
    """One image to decode into `out`, uint8 [*region.shape, channels]."""

    data: bytes
    header: Header
    region: Region
    out: np.ndarray


class Decoder:
    """Decodes to a fixed number of channels: 1 is grey, 3 is RGB, any other count must be the file's own.

    Transparent pixels lie on `background`; 16-bit ones are scaled to 8. For many threads at once.
    """

    def __init__(
        self,
        name: str,
        channels: int,
        background: int,
        target: tuple[int, int] | None,
        most_bytes: int | None = None,
    ) -> None:
        """name: of choose_decoder; target: (height, width) that boxes are resized to, None: keep full scale;
        most_bytes: of the pixels kept of an image, by a smaller scale if need be."""
        self._channels, self._background = channels, background
        self._target, self._most_bytes = target, most_bytes
        self._largest_divisor = 8 if name == "simplejpeg" else 1  # that the fast decoder takes
        self._regions: Callable[[Sequence[Job]], list[np.ndarray | None]] | None = None
        try:
            if channels in (1, 3) and name == "nvimgcodec":
                self._regions = _NvImageCodec(channels).regions
            if channels in (1, 3) and name == "simplejpeg":
                self._regions = _SimpleJpeg(channels).regions
        except (ImportError, AttributeError) as error:  # cannot be loaded, or is older than pyproject.toml's floor
            raise DataError(f"data.decode={name}: {error}; install a newer {_WHEELS[name]}, or set another") from None

    def region(self, header: Header, box: Box) -> Region:
        """The part of the file's image that `box` (in oriented full-scale pixels) needs."""
        turn, size = header.orientation, (header.height, header.width)
        stored = _flipped(_swapped(box, turn), turn, size)
        divisor = self._divisor(header, stored)
        if divisor != 1:
            stored = tuple(edge / divisor for edge in stored)  # type: ignore[assignment]
            size = (-(-size[0] // divisor), -(-size[1] // divisor))
        top, left = math.floor(stored[0]), math.floor(stored[1])
        bottom, right = min(math.ceil(stored[2]), size[0]), min(math.ceil(stored[3]), size[1])
        shape = (bottom - top, right - left)
        inside = (stored[0] - top, stored[1] - left, min(stored[2], size[0]) - top, min(stored[3], size[1]) - left)
        inside = _swapped(_flipped(inside, turn, shape), turn)
        return Region(top, left, bottom, right, divisor, shape[::-1] if turn >= 5 else shape, inside)

    def decode(self, jobs: Sequence[Job]) -> list[BadSample | None]:
        """Decode every job into its `out`; None, or why it cannot be."""
        regions: list[np.ndarray | None] = [None] * len(jobs)
        fast = [
            place
            for place, job in enumerate(jobs)
            if job.header.components in (1, 3) and job.region.divisor <= self._largest_divisor
        ]
        if self._regions is not None and fast:
            for place, region in zip(fast, self._regions([jobs[place] for place in fast]), strict=True):
                regions[place] = region
        return [self._finish(job, region) for job, region in zip(jobs, regions, strict=True)]

    def _finish(self, job: Job, region: np.ndarray | None) -> BadSample | None:
        """Orient a decoded region into place; what the fast decoder did not take, Pillow tries."""
        try:
            if region is None:
                region = self._by_pillow(job)
        except BadSample as bad:
            return bad
        job.out[:] = _oriented(region, job.header.orientation)
        return None

    def _divisor(self, header: Header, stored: Box) -> int:
        """What a box is stored at: by simplejpeg the smallest DCT scale that covers the target, which costs nothing;
        else twice the target or more, and in bytes no more than is allowed."""
        tall, wide = stored[2] - stored[0], stored[3] - stored[1]
        most = max(1, math.floor(min(tall, wide)))
        divisor = 1
        if self._target is not None:
            height, width = self._target[::-1] if header.orientation >= 5 else self._target
            times = min(tall / height, wide / width)
            divisor = _power_of_two(times / 2)
            if self._largest_divisor > 1 and header.components in (1, 3) and min(header.height, header.width) >= 8:
                divisor = max(divisor, min(self._largest_divisor, _power_of_two(times)))
        if self._most_bytes is not None:
            while tall * wide * self._channels > self._most_bytes * divisor**2 and 2 * divisor <= most:
                divisor *= 2
        return divisor

    def _by_pillow(self, job: Job) -> np.ndarray:
        """The region in the file's orientation, uint8 [h, w, channels]."""
        header, region = job.header, job.region
        by_dct = min(8, region.divisor) if header.components else 1
        by_boxes = region.divisor // by_dct
        whole = header.height * header.width // by_dct**2 * _BYTES_A_PIXEL + canvas_bytes(job.data)
        try:
            with ROOM.taken(whole), closing(_opened(job)) as image:
                grey = header.components == 3 and self._channels == 1
                if grey or by_dct > 1:  # luma as the file has it, like the other decoders
                    size = (header.width // by_dct, header.height // by_dct)
                    image.draft("L" if grey else None, size)  # type: ignore[attr-defined]
                image.load()
                if (image.height, image.width) != (-(-header.height // by_dct), -(-header.width // by_dct)):
                    raise BadSample("undecodable", f"decodes to {image.size}, its header says otherwise")
                edges = (edge * by_boxes for edge in (region.left, region.top, region.right, region.bottom))
                left, top, right, bottom = edges
                box = (left, top, min(right, image.width), min(bottom, image.height))
                if by_boxes > 1 and image.mode in ("L", "RGB") and not image.has_transparency_data:
                    return self._pixels(image.reduce(by_boxes, box))  # without a copy of its size
                return _reduced(self._pixels(image.crop(box)), by_boxes)
        except (BadSample, MemoryError):
            raise
        except Exception as error:  # its decoders raise nearly anything on damaged files
            raise BadSample("undecodable", f"{type(error).__name__}: {error}") from None

    def _pixels(self, image: Image.Image) -> np.ndarray:
        """A decoded image as uint8 [h, w, channels]."""
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise BadSample("undecodable", f"pixels of mode {image.mode} (32 bits) have no stated range")
        if self._channels not in (1, 3):
            if image.mode in ("1", "P", "PA"):
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            if len(image.getbands()) != self._channels:
                raise BadSample("channels", f"{len(image.getbands())} channels, model.num_channels={self._channels}")
            return np.asarray(image).reshape(image.height, image.width, self._channels)
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, (self._background,) * 3 + (255,))
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        image = image.convert("L" if self._channels == 1 else "RGB")
        return np.asarray(image).reshape(image.height, image.width, self._channels)


class _NvImageCodec:
    """Regions at full scale, on the CPU: a decoder with one thread for each calling thread (measured: faster
    than one decoder with many, which decodes a batch of regions one by one)."""

    def __init__(self, channels: int) -> None:
        from nvidia import nvimgcodec

        self._codec = nvimgcodec
        spec = nvimgcodec.ColorSpec.GRAY if channels == 1 else nvimgcodec.ColorSpec.SRGB
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=spec)
        self._device = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
        self._mine = threading.local()

    def regions(self, jobs: Sequence[Job]) -> list[np.ndarray | None]:
        streams = [self._stream(job) for job in jobs]
        images = self._decoder().decode([stream for stream in streams if stream is not None], params=self._params)
        decoded = iter(images)
        found = [next(decoded) if stream is not None else None for stream in streams]
        return [self._columns(job, image) for job, image in zip(jobs, found, strict=True)]

    def _decoder(self) -> Any:
        if not hasattr(self._mine, "decoder"):
            backends = [self._codec.Backend(self._codec.BackendKind.CPU_ONLY)]
            self._mine.decoder = self._codec.Decoder(device_id=self._device, max_num_cpu_threads=1, backends=backends)
        return self._mine.decoder

    def _stream(self, job: Job) -> Any:
        region, header = job.region, job.header
        try:
            stream = self._codec.CodeStream(job.data)
        except RuntimeError:
            return None
        left, right = (0, header.width) if _is_narrow(region) else (region.left, region.right)
        if (region.bottom - region.top, right - left) == (header.height, header.width):
            return stream
        return stream.get_sub_code_stream(region=self._codec.Region(region.top, left, region.bottom, right))

    def _columns(self, job: Job, image: Any) -> np.ndarray | None:
        if image is None:
            return None
        array = np.asarray(image)
        return array[:, job.region.left : job.region.right] if _is_narrow(job.region) else array


def _is_narrow(region: Region) -> bool:
    """libjpeg-turbo's smooth chroma needs more than two chroma columns: less it would not blend as in the whole."""
    return region.right - region.left < 8


class _SimpleJpeg:
    """The whole image at the region's DCT scale, then the region of it."""

    def __init__(self, channels: int) -> None:
        import simplejpeg

        self._decode = simplejpeg.decode_jpeg
        self._colorspace = "GRAY" if channels == 1 else "RGB"

    def regions(self, jobs: Sequence[Job]) -> list[np.ndarray | None]:
        return [self._region(job) for job in jobs]

    def _region(self, job: Job) -> np.ndarray | None:
        region, header = job.region, job.header
        height, width = -(-header.height // region.divisor), -(-header.width // region.divisor)
        try:
            # Not strict: small damage passes, as it does with the other decoders and with Pillow.
            whole = self._decode(job.data, self._colorspace, min_height=height, min_width=width, strict=False)
        except ValueError:
            return None
        if whole.shape[:2] != (height, width):
            return None
        return whole[region.top : region.bottom, region.left : region.right]


def _opened(job: Job) -> Image.Image:
    """Not decoded. Opened anew: what is kept open from its header on holds memory as long as its micro-batch lasts."""
    return Image.open(io.BytesIO(job.data), formats=("JPEG",)) if job.header.components else open_other(job.data)


def _power_of_two(most: float) -> int:
    """The largest up to `most`; 1 at least."""
    return 1 << max(0, math.floor(most).bit_length() - 1)


def _reduced(pixels: np.ndarray, divisor: int) -> np.ndarray:
    """Means of boxes of divisor x divisor pixels, those at the end cut."""
    if divisor == 1:
        return pixels
    bands = [Image.fromarray(np.ascontiguousarray(pixels[..., band])) for band in range(pixels.shape[2])]
    return np.stack([np.asarray(band.reduce(divisor)) for band in bands], axis=-1)


def _oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """An [h, w, c] array of the file as the picture is to be seen: a view."""
    rows, columns, swap = _TURNS[orientation]
    image = image[:: -1 if rows else 1, :: -1 if columns else 1]
    return image.swapaxes(0, 1) if swap else image


def _flipped(box: Box, orientation: int, size: tuple[int, int]) -> Box:
    """A box of the file's image of `size` (height, width) after the orientation's flips, or before them."""
    top, left, bottom, right = box
    rows, columns, _ = _TURNS[orientation]
    if rows:
        top, bottom = size[0] - bottom, size[0] - top
    if columns:
        left, right = size[1] - right, size[1] - left
    return top, left, bottom, right


def _swapped(box: Box, orientation: int) -> Box:
    """A box after the orientation's swap of axes, or before it."""
    top, left, bottom, right = box
    return (left, top, right, bottom) if _TURNS[orientation][2] else box
