"""ViTImageProcessor: images as a model wants them, by transformers' call and preprocessor_config.json."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from vitscale.config.model_rules import pair
from vitscale.config.typed import is_finite
from vitscale.errors import CheckpointError, ConfigError, DataError
from vitscale.files.model_folder import PROCESSOR, as_text, read_json, write_json
from vitscale.files.sources import HUB_OPTIONS
from vitscale.interop.image_arrays import MAX_PIXELS, as_array, flatten
from vitscale.interop.processor_files import TYPES, known_keys, processor_file
from vitscale.models.configuration import ViTConfig
from vitscale.text import did_you_mean

RESAMPLE = {filter.name.lower(): filter for filter in Image.Resampling}
_HUGE = 16_000_000  # pixels of a resized image of which a crop is taken
_FLAGS = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
_SIZES = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})


class BatchFeature(dict[str, Any]):
    """What the processor returns: `pixel_values` as an entry and as an attribute; `model(**batch)` takes it."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(self)}")
        return self[name]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same with its tensors moved or cast, by the arguments of torch.Tensor.to."""
        moved = {k: v.to(*args, **kwargs) if isinstance(v, torch.Tensor) else v for k, v in self.items()}
        return type(self)(moved)


@dataclass(kw_only=True)
class ViTImageProcessor:
    """Resize, centre crop (if asked for), rescale to [0, 1], normalize: transformers' ViTImageProcessor.

    transformers' own is not used: it does not import without a working torchvision, and knows 1, 3 or 4 channels only.
    Keys, defaults, files and results are those of transformers 5, within 1/255 of its PIL processor (Pillow's
    antialiased filters) on every kind of picture. Where it fails or does harm, ours differs:

    - do_convert_rgb=None means yes where image_mean has three numbers (there: no, so that greyscale and RGBA
      fail). Transparent pixels lie on white. Where image_mean has one number, pictures become grey.
    - 16-bit pictures (PIL's I;16) are scaled to 8 bits as in training; there, all above 255 of 65535 becomes
      white. Arrays are taken as they are by both: for uint16 pass rescale_factor=1 / 65535.
    - A PIL image is taken as its pixels lie, by both, whatever its EXIF orientation says: hand over the path
      (a str or Path) and it is turned, or use PIL.ImageOps.exif_transpose.
    - Arrays with a point are resized in float32, as by transformers' torchvision processor; its PIL one
      rounds them to 8 bits. Arrays of any number of channels are taken, also 2-D ones, which are grey.

    size: a side, (height, width), or a dict: height and width; shortest_edge with or without longest_edge;
    max_height and max_width, both keeping the aspect ratio. resample: a number or name of Pillow's filters
    (nearest, lanczos, bilinear, bicubic, box, hamming). image_mean, image_std: one number, or one a channel.
    Another flag of None is off, as there; any other key of None stays what it was.
    Raises ConfigError for options, DataError for images that cannot be processed.
    """

    do_convert_rgb: bool | None = None
    do_resize: bool = True
    size: Any = 224
    resample: int | str = Image.Resampling.BILINEAR
    do_center_crop: bool = False
    crop_size: Any = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | Sequence[float] = (0.5, 0.5, 0.5)
    image_std: float | Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool | None):
                raise ConfigError(f"{name}={value!r}: must be true, false or null")
            if name != "do_convert_rgb":
                setattr(self, name, bool(value))
        self.size = _size("size", self.size)
        self.resample = _resample(self.resample)
        if self.crop_size is not None:
            self.crop_size = _size("crop_size", self.crop_size)
        if self.do_center_crop and "height" not in (self.crop_size or {}):
            raise ConfigError(f"crop_size={self.crop_size}: do_center_crop needs a side, or height and width")
        self.rescale_factor = _number("rescale_factor", self.rescale_factor)
        self.image_mean = _numbers("image_mean", self.image_mean)
        self.image_std = _numbers("image_std", self.image_std)
        counts = {len(each) for each in (self.image_mean, self.image_std) if isinstance(each, tuple)}
        if len(counts) > 1:
            raise ConfigError(f"image_mean={self.image_mean}, image_std={self.image_std}: need as many numbers each")
        if not np.all(np.asarray(self.image_std) > 0):
            raise ConfigError(f"image_std={self.image_std}: must be above 0")

    @property
    def num_channels(self) -> int | None:
        """How many channels the images have in the end, as image_mean tells; None where it is one number for all."""
        each = self.image_mean if isinstance(self.image_mean, tuple) else self.image_std
        return len(each) if self.do_normalize and isinstance(each, tuple) else None

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every image in the end; None where it depends on the image."""
        size = self.crop_size if self.do_center_crop else self.size if self.do_resize else {}
        return (size["height"], size["width"]) if "height" in size else None

    def __call__(
        self, images: Any, return_tensors: str | None = None, input_data_format: str | None = None, **options: Any
    ) -> BatchFeature:
        """Images as `pixel_values` [n, channels, height, width].

        images: a PIL image, NumPy array, tensor or path, a batch in one array, or a list of any of them;
        input_data_format: channels_first or channels_last for arrays (default: told from their shape);
        return_tensors: "pt", "np", or None for a list of arrays; options: fields of this class, for this call.
        float32, or as they came with neither do_rescale nor do_normalize.
        """
        kind = None if return_tensors is None else str(getattr(return_tensors, "value", return_tensors))
        if kind not in (None, "pt", "np"):
            raise ConfigError(f"return_tensors={kind!r}: must be pt (torch), np (NumPy) or None (a list of arrays)")
        resolved = self.overridden(options)
        done = [resolved._process(image, input_data_format) for image in flatten(images)]
        if not done:
            raise DataError("no images were given")
        if kind is None:
            return BatchFeature(pixel_values=done)
        if len({image.shape for image in done}) > 1:
            shapes = ", ".join(sorted({"x".join(map(str, image.shape)) for image in done}))
            raise DataError(
                f"images of different sizes ({shapes}: channels x height x width) make no batch: pass do_resize=True "
                f"and a size of height and width (size={resolved.size}), or return_tensors=None"
            )
        batch = np.stack(done)
        return BatchFeature(pixel_values=torch.from_numpy(batch) if kind == "pt" else batch)

    preprocess = __call__

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """The processor of a folder with a preprocessor_config.json, a run's folder, that file, or a hub name.

        options: revision, cache_dir, local_files_only, token, subfolder (see sources.locate), and fields of this
        class, laid over the file's. CheckpointError for a file that is not there, broken, or of another processor.
        """
        path = processor_file(source, {name: options.pop(name) for name in HUB_OPTIONS if name in options})
        return cls.from_dict(read_json(path), str(path)).overridden(options)

    @classmethod
    def from_dict(cls, content: dict[str, Any], where: str = PROCESSOR) -> Self:
        """From preprocessor_config.json's content. CheckpointError, with `where`, for what it asks of others."""
        known = known_keys(content, {field.name for field in fields(cls)}, where)
        try:
            return cls().overridden(known)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from None

    def save_pretrained(self, folder: str | Path) -> list[str]:
        """Write FOLDER/preprocessor_config.json, which transformers reads; its path, in a list as there."""
        path = Path(folder) / PROCESSOR
        write_json(path, self.to_dict())
        return [str(path)]

    def to_dict(self) -> dict[str, Any]:
        """The content of preprocessor_config.json."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["resample"] = int(values["resample"])
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        present = {name: value for name, value in values.items() if value is not None}
        return {"image_processor_type": TYPES[0], **present}

    def to_json_string(self) -> str:
        """The file's text, as transformers' Trainer and hub classes ask for it."""
        return as_text(self.to_dict())

    def overridden(self, options: dict[str, Any]) -> Self:
        """This processor with other options; checked again, since fields may have been set by hand."""
        names = [field.name for field in fields(self)]
        for name in options.keys() - set(names):
            hint = did_you_mean(name, names) or f"; it has {', '.join(names)}"
            raise ConfigError(f"{name}: is no option of {type(self).__name__}{hint}")
        return replace(self, **{name: value for name, value in options.items() if value is not None or name in _FLAGS})

    def _process(self, image: Any, input_data_format: str | None) -> np.ndarray:
        """One image -> [channels, height, width]."""
        channels = self.num_channels
        to_rgb = channels == 3 if self.do_convert_rgb is None else self.do_convert_rgb
        whole = as_array(image, channels, to_rgb, input_data_format)
        height, width, bands = _shape(whole)
        if 0 in (height, width, bands):
            raise DataError(f"an image of {height}x{width} pixels, {bands} channels is empty")
        if channels not in (None, bands):
            convert = "pass do_convert_rgb=True, " if channels == 3 and bands in (1, 4) else ""
            raise DataError(
                f"an image of {bands} channels: the model's are {channels}, as image_mean has; give images of "
                f"{channels}, {convert}or use a model of num_channels={bands}"
            )
        has_fractions = isinstance(whole, np.ndarray) and whole.dtype.kind == "f" and bool(whole.max() <= 1)
        if self.do_rescale and self.rescale_factor < 1 and has_fractions:
            warnings.warn("pixels in [0, 1] are rescaled once more; pass do_rescale=False for those", stacklevel=2)
        size = _target(self.size, height, width) if self.do_resize else (height, width)
        crop = (self.crop_size["height"], self.crop_size["width"]) if self.do_center_crop else size
        spans = [_middle(side, kept) for side, kept in zip(size, crop, strict=True)]
        if math.prod(stop - start for start, stop in spans) > MAX_PIXELS:
            raise DataError(
                f"an image of {height}x{width} pixels would become {size[0]}x{size[1]}, more than {MAX_PIXELS} pixels; "
                "give the processor a size of height and width, or do_center_crop=True"
            )
        array = _padded(_resized(whole, size, spans, self.resample), crop)
        return self._normalized(np.moveaxis(array, -1, 0))

    def _normalized(self, array: np.ndarray) -> np.ndarray:
        if not self.do_rescale and not self.do_normalize:
            return np.ascontiguousarray(array)
        factor = self.rescale_factor if self.do_rescale else 1.0
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else (0.0, 1.0)
        scale, shift = (np.reshape(np.divide(each, std), (-1, 1, 1)) for each in (factor, mean))
        values = array.astype(np.float32, order="C")
        values *= scale.astype(np.float32)
        values -= shift.astype(np.float32)
        return values


def _size(name: str, size: Any) -> dict[str, int]:
    """A size in any of transformers' forms as a dict."""
    sides = (size, size) if isinstance(size, int) else size
    if isinstance(sides, list | tuple) and len(sides) == 2:
        sides = {"height": sides[0], "width": sides[1]}
    given = {key: value for key, value in sides.items() if value is not None} if isinstance(sides, dict) else {}
    numbers = all(type(value) is int and value > 0 for value in given.values())
    if set(given) not in _SIZES or not numbers:
        forms = "; ".join(" and ".join(sorted(keys)) for keys in _SIZES)
        raise ConfigError(f"{name}={size!r}: must be pixels: a side, (height, width), or a dict of {forms}")
    return given


def _target(size: dict[str, int], height: int, width: int) -> tuple[int, int]:
    """(height, width) that an image becomes; sides are cut to whole pixels as transformers does."""
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return max(int(height * scale), 1), max(int(width * scale), 1)
    edge, longest = float(size["shortest_edge"]), size.get("longest_edge")
    short, long = sorted((height, width))
    if longest is not None and long / short * edge > longest:
        edge = longest * short / long
    new_short = max(round(edge), 1)
    if short == new_short:
        return height, width
    new_long = max(int(edge * long / short), 1)
    return (new_short, new_long) if height <= width else (new_long, new_short)


def _shape(image: np.ndarray | Image.Image) -> tuple[int, ...]:
    """(height, width, channels)"""
    return image.shape if isinstance(image, np.ndarray) else (image.height, image.width, len(image.getbands()))


def _middle(side: int, kept: int) -> tuple[int, int]:
    """Where a centre crop of `kept` pixels begins and ends along a side; the whole side if that is shorter."""
    start = max(0, (side - kept) // 2)
    return start, min(side, start + kept)


def _resized(
    image: np.ndarray | Image.Image, size: tuple[int, int], spans: Sequence[tuple[int, int]], resample: Any
) -> np.ndarray:
    """What lies within `spans` (rows, columns) of the image resized to `size`: [h, w, channels], by Pillow.

    uint8 stay uint8, all else becomes float32. Of what would be huge, as a line of 60,000 pixels whose shorter side is
    to be 256, only what is kept is computed: float32 the same but for rounding; nearest and box may pick a neighbour,
    and sharp edges of uint8 differ where the 8 bits between Pillow's passes are full.
    """
    height, width, channels = _shape(image)
    (top, bottom), (left, right) = spans
    if size == (height, width):
        return np.asarray(image).reshape(height, width, channels)[top:bottom, left:right]
    if size[0] * size[1] <= _HUGE:
        return _by_pillow(image, size[::-1], None, resample)[top:bottom, left:right]
    y, x = height / size[0], width / size[1]
    box = (left * x, top * y, min(right * x, width), min(bottom * y, height))
    return _by_pillow(image, (right - left, bottom - top), box, resample)


def _by_pillow(
    image: np.ndarray | Image.Image, size: tuple[int, int], box: tuple[float, ...] | None, resample: Any
) -> np.ndarray:
    """The box of an image (None: all of it) resized to `size` (width, height), as [height, width, channels].

    Arrays that are no RGB go band by band: Pillow takes four for RGBA, whose colours it would weigh by the fourth.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2] == 3:
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return np.asarray(image.resize(size, resample, box)).reshape(*size[::-1], -1)
    whole = image if image.dtype == np.uint8 else image.astype(np.float32)
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(whole, -1, 0)]
    resized = np.stack([np.asarray(band.resize(size, resample, box)) for band in bands], axis=-1)
    if image.dtype.kind in "iu" and image.dtype != np.uint8:
        resized.clip(np.iinfo(image.dtype).min, np.iinfo(image.dtype).max, out=resized)
    return resized


def _padded(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The array in the middle of zeros, where it is smaller than `size`."""
    missing = [new - old for new, old in zip(size, array.shape, strict=False)]
    if not any(missing):
        return array
    return np.pad(array, (*((-(-each // 2), each // 2) for each in missing), (0, 0)))


def _resample(value: Any) -> Image.Resampling:
    if isinstance(value, str) and value.lower() in RESAMPLE:
        return RESAMPLE[value.lower()]
    try:
        return Image.Resampling(None if isinstance(value, bool) else value)
    except ValueError:
        known = ", ".join(f"{name} ({int(each)})" for name, each in RESAMPLE.items())
        raise ConfigError(f"resample={value!r}: must be one of {known}") from None


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """One number, or a tuple of them."""
    value = value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
    rule = "a number, or one a channel"
    several = isinstance(value, list | tuple) and value
    return tuple(_number(name, each, rule) for each in value) if several else _number(name, value, rule)


def _number(name: str, value: Any, rule: str = "a number") -> float:
    if not is_finite(value):
        raise ConfigError(f"{name}={value!r}: must be {rule}")
    return float(value)


def per_channel(name: str, values: Any, channels: int) -> tuple[float, ...]:
    """One number a channel; a single one is for all."""
    each = tuple(values) if isinstance(values, list | tuple) else (values,)
    numbers = each * channels if len(each) == 1 else each
    if len(numbers) != channels or not all(map(is_finite, numbers)):
        raise ConfigError(f"{name}={values!r}: must be one number, or one for each of {channels} channels")
    return numbers


def processor_for(
    config: ViTConfig, image_mean: Any, image_std: Any, size: Any = None, resample: int | str = RESAMPLE["bicubic"]
) -> ViTImageProcessor:
    """The processor of a model: images are squeezed to its size or, with `size`, resized to that and cropped."""
    model_size, channels, crops = pair(config.image_size), config.num_channels, size is not None
    return ViTImageProcessor(
        do_convert_rgb=channels == 3,
        size=size if crops else model_size,
        resample=resample,
        do_center_crop=crops,
        crop_size=model_size if crops else None,
        image_mean=per_channel("image_mean", image_mean, channels),
        image_std=per_channel("image_std", image_std, channels),
    )
