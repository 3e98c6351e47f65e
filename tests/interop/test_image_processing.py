"""Our processor and transformers' own ones, PIL's and torchvision's: the same pixels."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.interop.pictures import (
    CHINA,
    LEVEL,
    PICTURES,
    THEIRS,
    assert_alike,
    by_both,
    exif_turned,
    pixels,
    sixteen_bits,
    transparent,
)
from vitscale.errors import DataError
from vitscale.interop import image_processing
from vitscale.interop.image_processing import BatchFeature, ViTImageProcessor


@by_both
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, backend: str) -> None:
    options = {"size": 96, "resample": 3, "do_convert_rgb": True}
    ours = ViTImageProcessor(**options)(PICTURES[name], return_tensors="np")
    # Pillow resizes for us and for their PIL processor: the same bits before they are normalized.
    within = 0 if backend == "pil" else LEVEL
    assert_alike(ours, THEIRS[backend](**options)(PICTURES[name], return_tensors="np"), within)


@pytest.mark.parametrize("resample", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_every_filter_by_name_and_number(resample: str) -> None:
    number = Image.Resampling[resample.upper()]
    theirs = THEIRS["pil"](resample=int(number))(CHINA, return_tensors="np")
    for value in (resample, resample.upper(), int(number), number):
        assert_alike(ViTImageProcessor(resample=value)(CHINA, return_tensors="np"), theirs, 0)


OPTIONS: list[tuple[dict[str, Any], float]] = [  # and what one of 255 levels is with them
    ({"size": {"shortest_edge": 100}}, LEVEL),
    ({"size": {"shortest_edge": 100, "longest_edge": 120}}, LEVEL),
    ({"size": {"shortest_edge": 100, "longest_edge": 1000}}, LEVEL),
    ({"size": {"max_height": 50, "max_width": 60}}, LEVEL),
    ({"size": (48, 80)}, LEVEL),
    ({"do_center_crop": True, "crop_size": (61, 40)}, LEVEL),
    ({"do_center_crop": True, "crop_size": {"height": 300, "width": 301}, "size": (200, 121)}, LEVEL),
    ({"do_resize": False, "do_center_crop": True, "crop_size": {"height": 500, "width": 332}}, LEVEL),
    ({"do_resize": False}, LEVEL),
    ({"do_rescale": False}, 2.0),
    ({"do_normalize": False}, 1 / 255),
    ({"do_rescale": False, "do_normalize": False}, 1.0),
    ({"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}, 2 / 255),
    ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, 1 / 255 / 0.224),
]


@pytest.mark.parametrize(("options", "level"), OPTIONS, ids=lambda value: str(value))
def test_options(options: dict[str, Any], level: float) -> None:
    """In the constructor, and over another processor's for one call."""
    theirs = {name: processor(**options)(CHINA, return_tensors="np") for name, processor in THEIRS.items()}
    for processor, call in ((ViTImageProcessor(**options), {}), (ViTImageProcessor(), options)):
        ours = processor(CHINA, return_tensors="np", **call)
        assert_alike(ours, theirs["pil"], 1e-5 * level * 255)
        # An odd margin around a crop: their two differ by where its extra row goes, ours is PIL's.
        if options.get("crop_size") != {"height": 500, "width": 332}:
            assert_alike(ours, theirs["torchvision"], level)


@by_both
@pytest.mark.parametrize("flag", ["do_resize", "do_center_crop", "do_rescale", "do_normalize"])
def test_a_flag_of_none_is_off(flag: str, backend: str, tmp_path: Path) -> None:
    """In the constructor, a call and a file."""
    level = {"do_rescale": 2.0, "do_normalize": 1 / 255}.get(flag, LEVEL)
    others: dict[str, Any] = {"crop_size": 40, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(others | {flag: None}))
    pairs = [(each(**others | {flag: None}), {}) for each in (ViTImageProcessor, THEIRS[backend])]
    pairs += [(each(**others), {flag: None}) for each in (ViTImageProcessor, THEIRS[backend])]
    pairs += [(each.from_pretrained(tmp_path), {}) for each in (ViTImageProcessor, THEIRS[backend])]
    done = [processor(CHINA, return_tensors="np", **call) for processor, call in pairs]
    for ours, theirs in zip(done[::2], done[1::2], strict=True):
        assert_alike(ours, theirs, level)
    off = ViTImageProcessor(**others | {flag: None})
    assert getattr(ViTImageProcessor.from_dict(off.to_dict()), flag) is False


@by_both
def test_arrays_like_theirs(backend: str) -> None:
    array = np.array(CHINA)  # a copy, which torch wants
    grey, rgba = np.array(CHINA.convert("L"))[..., None], np.array(transparent())
    theirs = THEIRS[backend](do_convert_rgb=True)
    for image in (array, torch.tensor(array), np.moveaxis(array, -1, 0), grey, rgba, np.stack([array, array])):
        assert_alike(ViTImageProcessor()(image, return_tensors="np"), theirs(image, return_tensors="np"))
    # Numbers with a point: one level more, since their PIL processor rounds them to 8 bits before the filter.
    fractions = (array / 255).astype(np.float32)
    for image in (fractions, torch.tensor(fractions), torch.tensor(fractions).permute(2, 0, 1)):
        ours = ViTImageProcessor(do_rescale=False)(image, return_tensors="np")
        assert_alike(ours, theirs(image, do_rescale=False, return_tensors="np"))
    with pytest.warns(UserWarning, match=r"pixels in \[0, 1\] are rescaled once more; pass do_rescale=False"):
        ViTImageProcessor()(fractions, return_tensors="np")


@pytest.mark.parametrize("channels", [1, 2, 4, 9, 13])
def test_channels(channels: int) -> None:
    """Any number, channel by channel; theirs can with torchvision, if the layout is said."""
    generator = np.random.default_rng(0)
    array = np.asarray(CHINA)[..., generator.integers(0, 3, channels)] // generator.integers(1, 4, channels).astype(
        "u1"
    )
    statistics = {"image_mean": [0.1 * i for i in range(channels)], "image_std": [1.0 + i for i in range(channels)]}
    theirs = THEIRS["torchvision"](**statistics)
    for resample in (2, 3):
        expected = theirs(array, resample=resample, input_data_format="channels_last", return_tensors="np")
        for image in (array, torch.tensor(np.moveaxis(array, -1, 0))):
            ours = ViTImageProcessor(**statistics)(image, resample=resample, return_tensors="np")
            assert_alike(ours, expected, 1 / 255)


def test_sixteen_bits() -> None:
    """A picture's are scaled to 8, where theirs makes nearly all of it white; an array's are the caller's to scale."""
    image = sixteen_bits()
    assert image.mode == "I;16"
    ours = ViTImageProcessor(resample="bicubic")(image, return_tensors="np")
    theirs = THEIRS["pil"](resample=3, do_convert_rgb=True)
    assert_alike(ours, theirs(CHINA.convert("L"), return_tensors="np"), 0)
    assert (pixels(theirs(image, return_tensors="np")) > 0.99).mean() > 0.9
    array = np.asarray(image)[..., None].repeat(3, -1)
    # Not bicubic: where its overshoot falls below 0, theirs wraps round to 65535.
    options = {"rescale_factor": 1 / 65535, "resample": 2, "return_tensors": "np"}
    assert_alike(ViTImageProcessor()(array, **options), THEIRS["torchvision"]()(array, **options))
    assert_alike(
        ViTImageProcessor()(array, **options | {"resample": 3}), ours, 2 * LEVEL
    )  # 8 bits are cut, not rounded


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    """A PIL image is taken as it lies, a path is turned: both as theirs."""
    path = tmp_path / "turned.jpg"
    path.write_bytes(exif_turned(orientation))
    ours, theirs = ViTImageProcessor(size=(60, 90)), THEIRS["pil"](size=(60, 90))
    with Image.open(path) as image:
        as_it_lies = ours(image, return_tensors="np")
        assert_alike(as_it_lies, theirs(image, return_tensors="np"), 0)
    turned = ours(path, return_tensors="np")
    assert_alike(turned, theirs(str(path), return_tensors="np"), 0)
    assert np.array_equal(pixels(turned), pixels(as_it_lies)) == (orientation == 1)
    assert np.array_equal(pixels(ours([str(path)], return_tensors="pt")), pixels(turned))


def test_one_channel_models_take_pictures() -> None:
    processor = ViTImageProcessor(image_mean=[0.5], image_std=[0.5])
    for name in ("china", "rgba", "palette", "grey"):
        assert pixels(processor(PICTURES[name], return_tensors="np")).shape == (1, 1, 224, 224)
    theirs = THEIRS["pil"](image_mean=[0.5], image_std=[0.5])(PICTURES["grey"], return_tensors="np")
    assert_alike(processor(CHINA, return_tensors="np"), theirs, 0)


def test_four_channel_models_take_pictures_of_four() -> None:
    """Colour by colour, and alpha like another; a palette stands for its colours. theirs can from arrays."""
    processor = ViTImageProcessor(image_mean=[0.5] * 4, image_std=[0.5] * 4)
    theirs = THEIRS["torchvision"](image_mean=[0.5] * 4, image_std=[0.5] * 4)
    for name in ("rgba", "palette_clear", "cmyk"):
        picture = PICTURES[name]
        bands = np.array(picture if name == "cmyk" else picture.convert("RGBA"))
        assert_alike(processor(picture, return_tensors="np"), theirs(bands, return_tensors="np"))
        assert_alike(processor(bands, return_tensors="np"), theirs(bands, return_tensors="np"))
    with pytest.raises(DataError, match=r"3 channels: the model's are 4.*num_channels=3"):
        processor(CHINA)


def test_what_is_returned() -> None:
    batch = ViTImageProcessor()(CHINA, return_tensors="pt")
    assert isinstance(batch, BatchFeature)
    assert batch.pixel_values is batch["pixel_values"]
    assert batch.to(torch.float64).pixel_values.dtype == torch.float64
    assert dict(**batch).keys() == {"pixel_values"}
    with pytest.raises(AttributeError, match="pixel_values"):
        batch.labels  # noqa: B018
    different = ViTImageProcessor(do_resize=False)([CHINA, CHINA.resize((8, 9))])
    assert [image.shape for image in different.pixel_values] == [(3, 427, 640), (3, 9, 8)]
    array = np.asarray(CHINA)
    untouched = ViTImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)(array, return_tensors="pt")
    assert untouched.pixel_values.dtype == torch.uint8
    assert np.array_equal(untouched.pixel_values[0].permute(1, 2, 0), array)
    before = array.copy()
    ViTImageProcessor(do_resize=False)(array.astype(np.float32), return_tensors="np")
    assert np.array_equal(array, before)


@pytest.mark.parametrize("shape", [(1, 60000, 3), (60000, 1, 3), (3, 2000, 3), (1, 1, 3), (2, 9000, 1)])
@pytest.mark.parametrize("size", [{"shortest_edge": 36}, {"shortest_edge": 36, "longest_edge": 100}, 32])
def test_lines_and_dots_are_images_too(shape: tuple[int, ...], size: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mean = [0.5] * shape[2]
    processor = ViTImageProcessor(size=size, do_center_crop=True, crop_size=32, image_mean=mean, image_std=mean)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = processor(image, input_data_format="channels_last", return_tensors="np").pixel_values
    assert made.shape == (1, shape[2], 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB; 12 GB once


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("kind", ["picture", "bands", "floats"])
def test_a_crop_of_what_would_be_huge_is_the_same(kind: str, resample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image: Any = np.asarray(CHINA)[:150, :211]
    image = {"picture": Image.fromarray(image), "bands": image[..., :2], "floats": image / np.float32(255)}[kind]
    statistics = {"image_mean": 0.5, "image_std": 0.5, "do_rescale": kind != "floats", "do_convert_rgb": False}
    options = {"size": {"shortest_edge": 97}, "do_center_crop": True, "crop_size": 64, "resample": resample}
    processor = ViTImageProcessor(**options | statistics)
    arguments = {} if kind == "picture" else {"input_data_format": "channels_last"}
    usual = processor(image, return_tensors="np", **arguments)
    monkeypatch.setattr(image_processing, "_HUGE", 0)
    assert_alike(processor(image, return_tensors="np", **arguments), usual)


def test_what_would_be_huge_without_a_crop_is_refused() -> None:
    line = np.zeros((1, 60000, 3), dtype=np.uint8)
    with pytest.raises(DataError, match=r"1x60000 pixels would become 36x2160000, more than .*do_center_crop"):
        ViTImageProcessor(size={"shortest_edge": 36})(line, input_data_format="channels_last")
