"""Our processor and transformers' own ones, PIL's and torchvision's: the same pixels, files and calls."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from vitscale.errors import CheckpointError, ConfigError, DataError
from vitscale.interop.image_arrays import decode
from vitscale.interop.image_processing import AutoImageProcessor, BatchFeature, ViTImageProcessor, processor_dict
from vitscale.models.configuration import ViTConfig

transformers = pytest.importorskip("transformers")
pil_backend = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")

THEIRS = {"pil": pil_backend.ViTImageProcessorPil, "torchvision": transformers.ViTImageProcessor}
LEVEL = 2 / 255  # one of 255 levels, once normalized by 0.5 and 0.5
GRACE_HOPPER = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"

by_both = pytest.mark.parametrize("backend", THEIRS)


def photograph(name: str) -> Image.Image:
    if name == "grace_hopper":
        with Image.open(GRACE_HOPPER) as image:
            return image.convert("RGB")
    return Image.fromarray(load_sample_image(f"{name}.jpg"))


CHINA = photograph("china")


def exif_turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    CHINA.save(stream, "JPEG", exif=exif, quality=90)
    return stream.getvalue()


def transparent() -> Image.Image:
    """Opaque at the left, clear at the right."""
    image = CHINA.convert("RGBA")
    image.putalpha(Image.fromarray(np.broadcast_to(np.linspace(255, 0, CHINA.width), CHINA.size[::-1]).astype("uint8")))
    return image


def with_clear_colour() -> Image.Image:
    image = CHINA.convert("P")
    image.info["transparency"] = np.asarray(image)[0, 0].item()
    return image


def sixteen_bits() -> Image.Image:
    """A 16-bit greyscale PNG, opened; its low bytes are not its high ones."""
    grey = np.asarray(CHINA.convert("L")).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(grey << 8 | 255 - grey).save(stream, "PNG")
    return Image.open(io.BytesIO(stream.getvalue()))


PICTURES = {
    "china": CHINA,
    "flower": photograph("flower"),
    "grace_hopper": photograph("grace_hopper"),
    "grey": CHINA.convert("L"),
    "rgba": transparent(),
    "grey_alpha": transparent().convert("LA"),
    "palette": CHINA.convert("P"),
    "palette_clear": with_clear_colour(),
    "cmyk": CHINA.convert("CMYK"),
    "black_white": CHINA.convert("1"),
    "small": CHINA.resize((31, 17)),
}


def pixels(batch: Any) -> np.ndarray:
    return np.asarray(batch["pixel_values"])


def assert_alike(ours: Any, theirs: Any, within: float = LEVEL) -> None:
    a, b = pixels(ours), pixels(theirs)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.abs(a.astype(np.float64) - b).max() <= within + 1e-5


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


@by_both
def test_folders_both_ways(tmp_path: Path, backend: str) -> None:
    options: dict[str, Any] = {"size": {"height": 32, "width": 48}, "resample": 1, "image_mean": [0.1, 0.2, 0.3]}
    options |= {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}, "do_convert_rgb": True}
    THEIRS[backend](**options).save_pretrained(tmp_path / "theirs")
    ours = ViTImageProcessor.from_pretrained(tmp_path / "theirs")
    assert ours == ViTImageProcessor(**options)
    assert ours.size["height"] == 32
    assert ours.save_pretrained(tmp_path / "ours") == [str(tmp_path / "ours" / "preprocessor_config.json")]
    theirs = THEIRS[backend].from_pretrained(tmp_path / "ours")
    assert theirs.to_dict() == THEIRS[backend](**options).to_dict()
    assert_alike(ours(CHINA, return_tensors="np"), theirs(CHINA, return_tensors="np"))
    again = AutoImageProcessor.from_pretrained(tmp_path / "ours" / "preprocessor_config.json", size=16)
    assert again.size == {"height": 16, "width": 16}
    assert again.image_mean == ours.image_mean
    auto = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert type(auto).__name__ == "ViTImageProcessor"


def test_run_folders_and_names_on_the_hub(tmp_path: Path) -> None:
    """A run's model/, and huggingface_hub's cache as it lies on disk."""
    ViTImageProcessor(size=16).save_pretrained(tmp_path / "run" / "model")
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").size == {"height": 16, "width": 16}
    repository, commit = tmp_path / "hub" / "models--lab--cells", "0" * 40
    ViTImageProcessor(size=24).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    options = {"revision": "v2", "cache_dir": tmp_path / "hub", "local_files_only": True}
    assert AutoImageProcessor.from_pretrained("lab/cells", **options).size == {"height": 24, "width": 24}
    assert ViTImageProcessor.from_pretrained("lab/cells", do_resize=False, **options).do_resize is False
    with pytest.raises(CheckpointError, match="lab/cell"):
        AutoImageProcessor.from_pretrained("lab/cell", **options)


def test_files_of_older_versions() -> None:
    """google/vit-base-patch16-224's, facebook/vit-mae-base's, and one of the fast processors of transformers 4."""
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    first = {"do_normalize": True, "do_resize": True, **means, "size": 224}
    default = ViTImageProcessor()
    assert ViTImageProcessor.from_dict(first) == default
    assert ViTImageProcessor.from_dict({**first, "feature_extractor_type": "ViTFeatureExtractor"}) == default
    fast = {
        **first,
        "image_processor_type": "ViTImageProcessorFast",
        "crop_size": None,
        "data_format": "channels_first",
    }
    fast |= {"default_to_square": True, "device": None, "do_center_crop": None, "do_convert_rgb": None, "do_pad": None}
    fast |= {"input_data_format": None, "resample": 2, "rescale_factor": 0.00392156862745098, "return_tensors": None}
    assert ViTImageProcessor.from_dict(fast) == default


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    for content, said in (
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"data_format": "channels_last"}, "data_format"),
        ({"size": {"longest_edge": 9}}, "size="),
        ({"size": 9.5}, "size="),
        ({"resample": 17}, "lanczos"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"do_center_crop": True}, "crop_size"),
        ([], "list"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=said) as error:
            ViTImageProcessor.from_pretrained(tmp_path)
        assert "preprocessor_config.json" in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        ViTImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(CheckpointError, match=r"holds no preprocessor_config.json;.* ViTImageProcessor\(size="):
        AutoImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="swin"):
        AutoImageProcessor.from_pretrained(tmp_path)


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


def test_an_ambiguous_array_is_told() -> None:
    with pytest.warns(UserWarning, match="input_data_format"):
        batch = ViTImageProcessor(size=4)(np.zeros((3, 8, 3), "u1"), return_tensors="np")
    assert batch.pixel_values.shape == (1, 3, 4, 4)
    # Their rule would take the first axis of four for the channels.
    assert ViTImageProcessor(size=4)(np.zeros((4, 8, 3), "u1"), return_tensors="np").pixel_values.shape == (1, 3, 4, 4)


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


def test_what_a_model_gets() -> None:
    """preprocessor_config.json as a saved model has it."""
    content = processor_dict(ViTConfig(image_size=(32, 48), patch_size=16), (0.5,), (0.1, 0.2, 0.3))
    assert content == {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": 32, "width": 48},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.1, 0.2, 0.3],
    }
    for channels in (1, 4, 9):
        content = processor_dict(ViTConfig(num_channels=channels), (0.5,), (0.5,))
        assert ViTImageProcessor.from_dict(content).num_channels == channels
        assert ViTImageProcessor.from_dict(content).output_size == (224, 224)
    with pytest.raises(ConfigError, match="9 channels"):
        processor_dict(ViTConfig(num_channels=9), (0.5, 0.5), (0.5,))
