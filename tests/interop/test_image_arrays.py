"""Whatever is handed over as an image: arrays of any layout, paths, and what is none."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib import format as npy_format
from PIL import Image

from tests.interop.pictures import CHINA, PICTURES, assert_alike, exif_turned, pixels, sixteen_bits
from vitscale.errors import ConfigError, DataError
from vitscale.interop.image_arrays import decode
from vitscale.interop.image_processing import ViTImageProcessor


def test_arrays_of_every_layout() -> None:
    """The same picture, however it is handed over."""
    last = np.asarray(CHINA.resize((120, 90)))
    first = np.ascontiguousarray(np.moveaxis(last, -1, 0))
    processor = ViTImageProcessor(size=64)
    expected = pixels(processor(Image.fromarray(last), return_tensors="np"))
    assert expected.shape == (1, 3, 64, 64)
    for single in (last, first, torch.tensor(last), torch.tensor(first), last[:, ::-1][:, ::-1]):
        for images in (single, [single], (single,), [[single]], single[None], [single[None]]):
            assert np.array_equal(pixels(processor(images, return_tensors="pt")), expected)
    batch = processor(torch.tensor(np.stack([first, first[:, ::-1]])), return_tensors="np")
    assert np.array_equal(batch.pixel_values[:1], expected)
    assert np.array_equal(batch.pixel_values[1:], pixels(processor([first[:, ::-1]], return_tensors="np")))
    mixed = processor([Image.fromarray(last), last, torch.tensor(first)], return_tensors="pt").pixel_values
    assert np.array_equal(mixed, np.repeat(expected, 3, axis=0))


def test_an_ambiguous_array_is_told() -> None:
    with pytest.warns(UserWarning, match="input_data_format"):
        batch = ViTImageProcessor(size=4)(np.zeros((3, 8, 3), "u1"), return_tensors="np")
    assert batch.pixel_values.shape == (1, 3, 4, 4)
    # Their rule would take the first axis of four for the channels.
    assert ViTImageProcessor(size=4)(np.zeros((4, 8, 3), "u1"), return_tensors="np").pixel_values.shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        (np.zeros((8, 8, 4), "u1"), {"do_convert_rgb": False}, "of 4 channels: the model's are 3.*do_convert_rgb=True"),
        (np.zeros((9, 8, 5), "u1"), {}, "channels_first"),
        (np.zeros((5, 8, 8), "u1"), {"input_data_format": "channels_first"}, "num_channels=5"),
        (CHINA, {"image_mean": (0.5,) * 9, "image_std": 1.0}, "3 channels: the model's are 9"),
        (np.zeros((1, 2, 8, 8, 3), "u1"), {}, "shape"),
        (np.zeros((0, 8, 3), "u1"), {}, "empty"),
        ([], {}, "no images"),
        ([3], {}, "int"),
        ("no/such.jpg", {}, "no/such.jpg: cannot be read"),
        ("https://example.org/cat.jpg", {}, "URL"),
        (Image.new("F", (4, 4)), {}, "rescale_factor"),
        ([CHINA, CHINA.resize((8, 9))], {"do_resize": False}, "3x427x640, 3x9x8.*do_resize=True"),
        (CHINA, {"resampel": 3}, "did you mean resample"),
        (CHINA, {"resample": "bycubic"}, "bicubic"),
        (CHINA, {"size": 0}, "size"),
        (CHINA, {"return_tensors": "tf"}, "return_tensors"),
        (np.zeros((8, 8, 3), "u1"), {"input_data_format": "HWC"}, "input_data_format"),
        (np.full((8, 8, 4), 7.0), {}, "0 to 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(images: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said) as error:
        ViTImageProcessor()(images, **{"return_tensors": "pt"} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*PICTURES, "sixteen_bits"])
def test_a_path_is_the_picture_in_it(name: str, channels: int, tmp_path: Path) -> None:
    """Files are read by the data room's decoders, opened images by Pillow: one rule."""
    picture = sixteen_bits() if name == "sixteen_bits" else PICTURES[name]
    path = tmp_path / ("picture.tiff" if name == "cmyk" else "picture.png")
    options = {"transparency": picture.info["transparency"]} if name == "palette_clear" else {}
    picture.save(path, **options)
    processor = ViTImageProcessor(image_mean=(0.5,) * channels, image_std=(0.5,) * channels)
    with Image.open(path) as image:
        expected = processor(image, return_tensors="np")
    assert_alike(processor(path, return_tensors="np"), expected, 0)
    assert_alike(expected, processor(picture, return_tensors="np"), 0)


def test_bad_files() -> None:
    photo = exif_turned(1)
    assert decode(photo, 3, "x").shape == (427, 640, 3)
    for data, said in (
        (b"", "0 bytes"),
        (b"hello, I am called .jpg", "image"),
        (photo[: len(photo) // 2], "cut"),
        (b"\x93NUMPY\x01\x00", "npy"),
    ):
        with pytest.raises(DataError, match=said) as error:
            decode(data, 3, "holiday.jpg")
        assert str(error.value).startswith("holiday.jpg: ")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_a_raised_limit_is_raised_for_pillow_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("L", (30, 20)).save(stream, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # it refuses what has twice as many
    with pytest.raises(DataError, match="more than 500 pixels"):
        decode(stream.getvalue(), 1, "x", max_pixels=500)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(stream.getvalue(), 1, "x", max_pixels=600).shape == (20, 30, 1)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def claiming(**header: Any) -> bytes:
    """A .npy file of few bytes whose header says this."""
    text = f"{ {'descr': '|u1', 'fortran_order': False, 'shape': (8, 8, 3)} | header }".ljust(117).encode() + b"\n"
    return npy_format.magic(1, 0) + struct.pack("<H", len(text)) + text + bytes(192)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype="u1").reshape(2, 4, 3),
        np.asfortranarray(np.arange(24.0).reshape(2, 4, 3)),
        np.arange(24, dtype=">f4").reshape(3, 2, 4),
        np.ones((2, 4), bool),
        np.full((2, 4), 65504, "f2"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_npy(array: np.ndarray) -> None:
    """As NumPy reads it, channels last."""
    last = array[..., None] if array.ndim == 2 else array.transpose(1, 2, 0) if array.shape[0] == 3 else array
    assert np.array_equal(decode(npy(array), 3, "x.npy"), last)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (claiming(shape=(3_000_000, 1_000_000)), "is cut: 192 of 3000000000000 bytes"),
        (claiming(shape=(3_000_000, 1_000_000, 10**400)), "is cut"),
        (claiming(shape=(8_001, 8_000, 0)), "neither its first"),
        (claiming(shape=(3, 8_001, 8_000), descr="|V0"), "not one image"),
        (claiming(shape=(-8, -8, 3)), "not one image"),
        (claiming(shape=(192,)), "not one image"),
        (claiming(descr="|O"), "not one image"),
        (claiming(descr="<c8"), "not one image"),
        (claiming(descr=[("x", "|u1")]), "not one image"),
        (claiming(descr="nonsense"), "header is broken"),
        (claiming(shape=3), "header is broken"),
        (claiming(shape="abc"), "header is broken"),
        (claiming().replace(b"}", b"("), "header is broken"),
        (claiming().replace(b"{", b"\xff"), "header is broken"),
        (claiming()[:40], "header is broken"),
        (claiming()[:8], "header is broken"),
        (b"\x93NUMPY\x09\x00" + bytes(99), "header is broken"),
        (npy(np.ones((8, 8, 3)))[:-1], "is cut: 1535 of 1536 bytes"),
        (npy(np.full((8, 8, 3), np.nan)), "NaN or too large"),
        (npy(np.full((8, 8), -np.inf, "f4")), "NaN or too large"),
        (npy(np.full((8, 8, 3), 1e300)), "NaN or too large"),
    ],
)
def test_bad_npy(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        decode(data, 3, "x.npy")
    assert str(error.value).startswith("x.npy: ") or said == "neither its first"
    assert "\n" not in str(error.value)


def test_npy_of_too_many_pixels() -> None:
    for shape in ((8, 8, 3), (3, 8, 8), (8, 8)):
        assert decode(npy(np.zeros(shape, "u1")), 3, "x", 64).shape[:2] == (8, 8)
    for shape in ((8, 9, 3), (3, 8, 9), (65, 1)):
        with pytest.raises(DataError, match=r"x: more than 64 pixels.*--max-pixels"):
            decode(npy(np.zeros(shape, "u1")), 3, "x", 64)


@given(st.lists(st.tuples(st.integers(6, 80), st.integers(0, 255)), min_size=1, max_size=4))
def test_npy_files_damaged_anywhere(damage: list[tuple[int, int]]) -> None:
    """An image or a DataError, whatever bytes of the header are others."""
    content = bytearray(claiming())
    for place, byte in damage:
        content[place] = byte
    with contextlib.suppress(DataError), warnings.catch_warnings(action="ignore"):
        assert decode(bytes(content), 3, "x").ndim == 3
