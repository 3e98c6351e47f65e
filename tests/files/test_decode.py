from __future__ import annotations

import contextlib
import io
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.data import zoo_images
from tests.data.makers import encoded, photo, pixels, png_header
from vitscale.errors import DataError
from vitscale.files.decode import Box, Decoder, Job, choose_decoder
from vitscale.files.header import BadSample, Room, canvas_bytes, read_header

DECODERS = ("nvimgcodec", "simplejpeg", "pillow")
LIMIT = 1_000_000


def decode(
    data: bytes, box: Box | None = None, name: str = "pillow", channels: int = 3, background: int = 255,
    target: tuple[int, int] | None = None,
) -> tuple[np.ndarray, Box]:  # fmt: skip
    """The stored region and the box in it; raises what the decoder says is bad."""
    header = read_header(data, LIMIT)
    decoder = Decoder(name, channels, background, target)
    region = decoder.region(header, box or (0, 0, *header.oriented))
    out = np.empty((*region.shape, channels), dtype=np.uint8)
    (bad,) = decoder.decode([Job(data, header, region, out)])
    if bad is not None:
        raise bad
    return out, region.box


def by_pillow(data: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", DECODERS)
def test_crops_lie_in_the_picture_as_it_is_seen(name: str, orientation: int) -> None:
    for kind, options in (("JPEG", {"quality": 85}), ("JPEG", {"progressive": True}), ("PNG", {}), ("TIFF", {}),
                          ("WEBP", {"lossless": True})):  # fmt: skip
        data = encoded(pixels(orientation, 37, 53), kind, orientation, **options)
        expected = by_pillow(data)
        assert read_header(data, LIMIT).oriented == expected.shape[:2]
        for top, left, bottom, right in ((0, 0, *expected.shape[:2]), (3, 5, 30, 21), (11, 0, 12, 9), (20, 17, 37, 37)):
            out, box = decode(data, (top, left, bottom, right), name)
            assert box == (0, 0, bottom - top, right - left)
            assert np.array_equal(out, expected[top:bottom, left:right]), (kind, options, top, left)


@settings(max_examples=40)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 2), st.booleans(), st.integers(1, 8), st.data())
def test_the_fast_decoders_give_pillows_bits(
    height: int, width: int, subsampling: int, progressive: bool, orientation: int, data: st.DataObject
) -> None:
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise[: height // 2] //= 2
    jpeg = encoded(noise, "JPEG", orientation, subsampling=subsampling, progressive=progressive, quality=70)
    expected = by_pillow(jpeg)
    top = data.draw(st.integers(0, expected.shape[0] - 1))
    left = data.draw(st.integers(0, expected.shape[1] - 1))
    bottom = data.draw(st.integers(top + 1, expected.shape[0]))
    right = data.draw(st.integers(left + 1, expected.shape[1]))
    for name in ("nvimgcodec", "simplejpeg"):
        out, _ = decode(jpeg, (top, left, bottom, right), name)
        assert np.array_equal(out, expected[top:bottom, left:right]), name


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_simplejpeg_keeps_the_smallest_scale_that_covers_the_target(orientation: int) -> None:
    data = encoded(pixels(1, 301, 403), "JPEG", orientation, quality=95)
    full = Image.fromarray(by_pillow(data))
    for box, shrink in (((20, 30, 290, 300), 4), ((20, 30, 150, 160), 2), ((20, 30, 83, 95), 1), ((0, 0, 272, 273), 4)):
        out, inside = decode(data, box, "simplejpeg", target=(64, 64))
        top, left, bottom, right = inside
        assert (bottom - top, right - left) == ((box[2] - box[0]) / shrink, (box[3] - box[1]) / shrink)
        assert out.shape[0] <= (box[2] - box[0]) / shrink + 2
        small = Image.fromarray(out).resize((64, 64), Image.Resampling.BICUBIC, (left, top, right, bottom))
        whole = full.crop((box[1], box[0], box[3], box[2])).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(small, dtype=int) - np.asarray(whole, dtype=int)).mean() < 1.0


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_many_times_its_target_is_kept_smaller(kind: str, orientation: int) -> None:
    """At twice the target or more, by every decoder; what is less than four times it at full scale."""
    data = encoded(pixels(1, 301, 403), kind, orientation, quality=95)
    full = Image.fromarray(by_pillow(data))
    for name in ("nvimgcodec", "pillow"):
        for box, divisor in (((20, 30, 290, 300), 4), ((20, 30, 285, 183), 2), ((20, 30, 145, 160), 1)):
            out, (top, left, bottom, right) = decode(data, box, name, target=(32, 32))
            assert (bottom - top, right - left) == ((box[2] - box[0]) / divisor, (box[3] - box[1]) / divisor)
            assert out.shape[0] <= (box[2] - box[0]) / divisor + 2
            small = Image.fromarray(out).resize((32, 32), Image.Resampling.BICUBIC, (left, top, right, bottom))
            whole = full.crop((box[1], box[0], box[3], box[2])).resize((32, 32), Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(small, dtype=int) - np.asarray(whole, dtype=int)).mean() < 1.5


def test_bytes_of_an_image_are_bounded() -> None:
    """By data.batch_bytes, below the target if it must be."""
    for kind in ("JPEG", "PNG", "TIFF"):
        data = encoded(pixels(3, 300, 400), kind)
        for most, shape in ((300 * 400 * 3, (300, 400)), (90_000, (150, 200)), (1000, (10, 13)), (1, (2, 2))):
            header = read_header(data, LIMIT)
            decoder = Decoder("simplejpeg", 3, 0, (64, 64) if most == 1000 else None, most)
            region = decoder.region(header, (0, 0, 300, 400))
            assert region.shape == shape, (kind, most)
            out = np.empty((*shape, 3), np.uint8)
            assert decoder.decode([Job(data, header, region, out)]) == [None]
            if min(shape) >= 10:  # boxes at the edge are cut, and count as whole ones here
                mean = by_pillow(data).reshape(-1, 3).mean(axis=0)
                assert np.abs(out.reshape(-1, 3).mean(axis=0) - mean).max() < 10


def test_whole_images_wait_for_room() -> None:
    """So many bytes at once, whoever asks; one of more than all of it alone."""
    room, held, most = Room(100), [0], [0]
    lock = threading.Lock()

    def hold(count: int) -> None:
        with room.taken(count):
            with lock:
                held[0] += count
                most[0] = max(most[0], held[0])
            time.sleep(0.001)
            with lock:
                held[0] -= count

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, [40, 70, 10, 1000, 30] * 20))
    assert most[0] == 1000
    assert room._used == 0


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"quality": 80, "exif": b"Exif\0\0II*\0"}])
def test_what_a_webp_takes_is_told_by_its_header(options: dict[str, Any]) -> None:
    data = encoded(pixels(3, 300, 401), "WEBP", **options)
    assert canvas_bytes(data) == 8 * 300 * 401
    assert canvas_bytes(encoded(pixels(3), "PNG")) == 0


@pytest.mark.parametrize("name", DECODERS)
def test_grey_and_colour_become_each_other(name: str) -> None:
    colour = pixels(3)
    grey = encoded(colour[..., :1])
    assert np.array_equal(decode(grey, name=name)[0], by_pillow(grey))
    assert np.array_equal(decode(grey, name=name, channels=1)[0][..., 0], by_pillow(grey, "L"))
    luma = decode(encoded(colour), name=name, channels=1)[0][..., 0]
    assert np.array_equal(luma, decode(encoded(colour), name="pillow", channels=1)[0][..., 0])
    assert np.abs(luma.astype(int) - by_pillow(encoded(colour), "L")).mean() < 1  # rounding, and clipped overshoot
    assert np.array_equal(decode(encoded(colour, "PNG"), name=name)[0], colour)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind, mode", [("PNG", "P"), ("PNG", "1"), ("PNG", "L"), ("GIF", "P"), ("BMP", "RGB"),
                                        ("JPEG", "CMYK"), ("TIFF", "CMYK"), ("WEBP", "RGB")])  # fmt: skip
def test_other_modes_are_as_pillow_converts_them(name: str, kind: str, mode: str) -> None:
    data = encoded(Image.fromarray(pixels(4)).convert(mode), kind)
    assert np.array_equal(decode(data, (2, 3, 20, 30), name)[0], by_pillow(data)[2:20, 3:30])


@pytest.mark.parametrize("background", [0, 128, 255])
def test_transparent_pixels_lie_on_the_background(background: int) -> None:
    rgba = np.concatenate([pixels(5), pixels(6, channels=1)], axis=2)
    alpha = rgba[..., 3:].astype(float) / 255
    blended = rgba[..., :3] * alpha + background * (1 - alpha)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        out, _ = decode(encoded(Image.fromarray(rgba), kind, **options), background=background)
        assert np.abs(out - blended).max() <= 1
    grey, _ = decode(encoded(Image.fromarray(rgba).convert("LA"), "PNG"), background=background, channels=1)
    luma = np.asarray(Image.fromarray(rgba[..., :3]).convert("L"))
    assert np.abs(grey[..., 0] - (luma * alpha[..., 0] + background * (1 - alpha[..., 0]))).max() <= 2
    one_colour = Image.fromarray(np.full((4, 4, 3), 7, np.uint8))
    assert (decode(encoded(one_colour, "PNG", transparency=(7, 7, 7)), background=background)[0] == background).all()


def test_sixteen_bits_are_scaled() -> None:
    """Pillow's own conversion clips everything above 255 to white."""
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(values), kind)
        assert np.array_equal(decode(data, channels=1)[0][..., 0], (values >> 8).astype(np.uint8))
        assert np.array_equal(decode(data, channels=3)[0][..., 2], (values >> 8).astype(np.uint8))


def test_other_channel_counts_must_be_the_files() -> None:
    rgba = np.concatenate([pixels(5), pixels(6, channels=1)], axis=2)
    assert np.array_equal(decode(encoded(Image.fromarray(rgba), "PNG"), channels=4)[0], rgba)
    for data in (photo(0), encoded(pixels(0)[..., :1], "PNG")):
        assert why(data, channels=4).cause == "channels"
        assert "model.num_channels=4" in why(data, channels=4).reason


def why(data: bytes, name: str = "pillow", channels: int = 3) -> BadSample:
    with pytest.raises(BadSample) as caught:
        decode(data, name=name, channels=channels)
    return caught.value


@pytest.mark.parametrize("name", DECODERS)
def test_truncated_jpegs_are_undecodable_wherever_the_crop_lies(name: str) -> None:
    data = photo(1, 120, 160)
    for length in (2, 3, 20, 200, len(data) // 2, len(data) - 10, len(data) - 2, len(data) - 1):
        with pytest.raises(BadSample) as caught:
            decode(data[:length], (0, 0, 2, 2), name)
        assert caught.value.cause == "undecodable"


@pytest.mark.parametrize("name", DECODERS)
def test_what_no_decoder_reads(name: str) -> None:
    for data in (b"", b"hello", b"<html></html>", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" + bytes(100), b"GIF89a",
                 photo(0)[:300] + bytes(2000), encoded(pixels(0), "PNG")[:200], b"RIFF\0\0\0\0WEBP", bytes(5000),
                 b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):  # fmt: skip
        assert why(data, name).cause == "undecodable"
    assert "32 bits" in why(encoded(Image.new("F", (4, 4)), "TIFF"), name).reason


@pytest.mark.parametrize("name", DECODERS)
def test_slight_damage_is_taken_by_all_or_none(name: str) -> None:
    """libjpeg-turbo fills in what it cannot read; the decoders must agree on what is good."""
    data = bytearray(photo(2, 120, 160))
    middle = data.index(b"\xff\xda") + 200
    data[middle : middle + 40] = bytes(range(40))
    out, _ = decode(bytes(data), name=name)
    assert np.array_equal(out, by_pillow(bytes(data)))


def test_bombs_are_told_from_the_header() -> None:
    jpeg = bytearray(photo(0))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xff\xff\xff"
    for data in (png_header(5000, 5000), png_header(60000, 60000), bytes(jpeg)):
        bad = why(data)
        assert bad.cause == "too_large"
        assert "pixels" in bad.reason
    assert why(png_header(0, 10)).cause == "undecodable"


@pytest.mark.parametrize("remark", zoo_images.remarks())
def test_a_png_is_not_judged_by_its_remarks(remark: bytes) -> None:
    """Wherever they stand: large, damaged, or named as Pillow names what it has read."""
    plain = encoded(pixels(3), "PNG")
    expected, _ = decode(plain)
    for at in (33, len(plain) - 12):  # behind the header, behind the pixels
        assert np.array_equal(decode(plain[:at] + remark + plain[at:])[0], expected)


def test_a_png_is_turned_wherever_its_orientation_stands() -> None:
    turned = encoded(pixels(3, 24, 32), "PNG", orientation=6)
    at = turned.index(b"eXIf") - 4
    length = 12 + int.from_bytes(turned[at : at + 4], "big")
    block, plain = turned[at : at + length], turned[:at] + turned[at + length :]
    assert read_header(plain, LIMIT).oriented == (24, 32)
    assert read_header(plain[:-12] + block + plain[-12:], LIMIT).oriented == (32, 24)


def test_tiles_and_scans_are_limits_too() -> None:
    """A TIFF's tile is decoded whole; a scan of a progressive JPEG passes over all of the image for a few bytes."""
    assert np.array_equal(decode(zoo_images.tiled_tiff(64))[0], np.zeros((40, 40, 3), np.uint8))
    assert why(zoo_images.tiled_tiff(12_000)).cause == "too_large"
    assert decode(zoo_images.many_scans(100))[0].shape == (1000, 1000, 3)
    bad = why(zoo_images.many_scans(3_000))
    assert (bad.cause, bad.reason) == ("too_large", "progressive JPEG of more than 500 scans")


def test_what_a_png_unpacks_beside_its_pixels_is_not_unpacked() -> None:
    text = b"zTXt" + b"a\0\0" + zlib.compress(bytes(8 << 20), 9)
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    data = encoded(pixels(0), "PNG")
    tracemalloc.start()
    assert read_header(data[:33] + chunk + data[33:], 10**6).kind == "PNG"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@settings(max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]), st.data())
def test_damaged_files_decode_or_are_bad_samples(kind: str, data: st.DataObject) -> None:
    """Whatever the bytes: an image of the size that was said, or a BadSample."""
    good = bytearray(encoded(pixels(0), kind, orientation=6))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    for name in DECODERS:
        with contextlib.suppress(BadSample):
            decode(bytes(good), name=name)


def test_auto_is_the_first_that_is_installed() -> None:
    assert choose_decoder("auto") == "nvimgcodec"
    assert choose_decoder("pillow") == "pillow"


def test_a_decoder_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale.files.decode._is_installed", lambda package: False)
    assert choose_decoder("auto") == "pillow"
    with pytest.raises(DataError, match=r"data\.decode=simplejpeg.*pip install simplejpeg"):
        choose_decoder("simplejpeg")
