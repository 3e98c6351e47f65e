"""Whatever is handed over as an image (PIL, NumPy, torch, a file) as an array [height, width, channels]."""

from __future__ import annotations

import io
import math
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from PIL import Image

from vitscale.errors import ConfigError, DataError
from vitscale.files.decode import Decoder, Job
from vitscale.files.header import BadSample, read_header

CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"
WHITE = 255  # what transparent pixels lie on: transformers' rule, and data.background's default
MAX_PIXELS = 64_000_000  # data.max_pixels' default: a file that claims more is refused before it is decoded


def flatten(images: Any) -> list[Any]:
    """One image, a batch of them in one array, or (nested) lists of either, as a list of single images."""
    if isinstance(images, list | tuple):
        return [image for each in images for image in flatten(each)]
    if isinstance(images, Image.Image | str | os.PathLike):
        return [images]
    if not isinstance(images, np.ndarray | torch.Tensor):
        raise DataError(f"an image of type {type(images).__name__}: must be a PIL image, an array, a tensor or a path")
    if images.ndim == 4:
        return list(images)
    if images.ndim not in (2, 3):
        raise DataError(
            f"an array of shape {tuple(images.shape)}: an image is [height, width] or has channels first or last, "
            "a batch of them has one axis more"
        )
    return [images]


def as_array(image: Any, channels: int | None, to_rgb: bool, input_data_format: str | None) -> np.ndarray | Image.Image:
    """A single image as [height, width, channels], of the type that its numbers had.

    A PIL image stays one where it is RGB or grey (L): Pillow is to resize it, and copies are most of the cost.

    channels: what the model wants, where known: it tells an array's layout, and turns pictures grey
    where it is 1; to_rgb: 3 channels from grey (repeated) and RGBA (laid on white). DataError for what
    cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return decode(_bytes(image), 3 if to_rgb or channels is None else channels, str(image))
    if isinstance(image, Image.Image):
        return _from_pil(image, channels, to_rgb)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    array = _channels_last(image, channels, input_data_format)
    array = array.astype(np.uint8) if array.dtype == bool else array
    return _rgb(array) if to_rgb else array


def decode(data: bytes, channels: int, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image file's bytes as uint8 [height, width, channels], as training reads them.

    Turned by its EXIF orientation, transparent pixels laid on white, 16 bits scaled to 8; 1 channel is
    grey, 3 are RGB, any other number must be the file's own. A .npy file is taken as it is. DataError,
    with `name`, for what is empty, cut, too large or no image, and for numbers that are NaN or infinite.
    """
    if data.startswith(npy_format.MAGIC_PREFIX):
        return _npy(data, channels, name, max_pixels)
    try:
        header = read_header(data, max_pixels)
        decoder = _decoder(channels)
        height, width = header.oriented
        region = decoder.region(header, (0.0, 0.0, float(height), float(width)))
        out = np.empty((*region.shape, channels), dtype=np.uint8)
        bad = decoder.decode([Job(data, header, region, out)])[0]
    except BadSample as error:
        bad = error
    if bad is not None:
        raise DataError(f"{name}: {_too_large(max_pixels) if bad.cause == 'too_large' else bad.reason}")
    return out


def _too_large(max_pixels: int) -> str:
    return f"more than {max_pixels} pixels; cut it into pieces, make it smaller, or raise --max-pixels"


@lru_cache(maxsize=8)
def _decoder(channels: int) -> Decoder:
    return Decoder("simplejpeg", channels, WHITE, None)  # at full scale it gives Pillow's bits, only faster


def _bytes(path: str | os.PathLike[str]) -> bytes:
    text = os.fspath(path)
    if "://" in text:
        raise DataError(f"{text}: only files are read, not URLs; download it and name the file")
    try:
        return Path(text).read_bytes()
    except OSError as error:
        raise DataError(f"{text}: cannot be read: {error.strerror}") from None


def _npy(data: bytes, channels: int, name: str, max_pixels: int) -> np.ndarray:
    """The array of a .npy file, in place: nothing is allocated for what a header only claims."""
    stream = io.BytesIO(data)
    try:
        first = npy_format.read_magic(stream) == (1, 0)
        read = npy_format.read_array_header_1_0 if first else npy_format.read_array_header_2_0
        shape, columns_first, dtype = read(stream)
    except Exception:  # on a broken header it raises nearly anything
        raise DataError(f"{name}: cannot be read as .npy: its header is broken") from None
    if len(shape) not in (2, 3) or min(shape) < 0 or dtype.kind not in "buif":
        raise DataError(f"{name}: holds {dtype} of shape {shape}, not one image of numbers")
    start, needed = stream.tell(), math.prod(shape) * dtype.itemsize
    if len(data) - start < needed:
        raise DataError(f"{name}: is cut: {len(data) - start} of {needed} bytes of pixels are there")
    flat = np.frombuffer(data, dtype, math.prod(shape), start)
    array = _channels_last(flat.reshape(shape, order="F" if columns_first else "C"), channels, None)
    if array.shape[0] * array.shape[1] > max_pixels:
        raise DataError(f"{name}: {_too_large(max_pixels)}")
    with np.errstate(over="ignore"):
        if dtype.kind == "f" and not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise DataError(f"{name}: has pixels that are NaN or too large for float32; mend the array")
    return array


def _from_pil(image: Image.Image, channels: int | None, to_rgb: bool) -> np.ndarray | Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"an image of mode {image.mode}: its 32-bit numbers have no stated range; "
            "hand it over as an array, and say rescale_factor (1 / the largest value)"
        )
    if to_rgb or channels == 1:
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, (WHITE,) * 4)
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        image = image.convert("RGB" if to_rgb else "L")
    elif image.mode in ("1", "P", "PA"):  # a palette's numbers are no colours
        image = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
    return image if image.mode in ("RGB", "L") else np.asarray(image).reshape(image.height, image.width, -1)


def _channels_last(array: np.ndarray, channels: int | None, input_data_format: str | None) -> np.ndarray:
    """By `input_data_format`, else by which end has the model's number of channels, else 1, 3 or 4."""
    if array.ndim == 2:
        return array[:, :, None]
    if input_data_format is None:
        input_data_format = _layout(array.shape, channels)
    layout = str(getattr(input_data_format, "value", input_data_format))  # transformers has an enum for it
    if layout not in (CHANNELS_FIRST, CHANNELS_LAST):
        raise ConfigError(f"input_data_format={layout!r}: must be {CHANNELS_FIRST} or {CHANNELS_LAST}")
    return np.moveaxis(array, 0, -1) if layout == CHANNELS_FIRST else array


def _layout(shape: tuple[int, ...], channels: int | None) -> str:
    for counts in ((channels,), (1, 3, 4)):
        first, last = shape[0] in counts, shape[-1] in counts
        if first and last:
            warnings.warn(
                f"an array of shape {shape} may have its channels first or last; first is taken: "
                "input_data_format says which",
                stacklevel=2,
            )
        if first or last:
            return CHANNELS_FIRST if first else CHANNELS_LAST
    raise DataError(
        f"an array of shape {shape}: neither its first nor its last axis has {channels or '1, 3 or 4'} channels; "
        "pass input_data_format=channels_first or channels_last, or images of the model's channels"
    )


def _rgb(array: np.ndarray) -> np.ndarray:
    """Grey repeated, RGBA laid on white; other numbers of channels are left to whoever wants three."""
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] != 4:
        return array
    white = WHITE if np.issubdtype(array.dtype, np.integer) else 1.0
    if white == 1.0 and (array.min() < 0 or array.max() > 1):
        raise DataError(f"an RGBA array of {array.min()} to {array.max()}: numbers with a point must lie in 0 to 1")
    alpha = array[..., 3:] / white
    laid = alpha * array[..., :3] + (1 - alpha) * white
    return (np.round(laid) if white == WHITE else laid).astype(array.dtype)
