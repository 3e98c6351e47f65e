"""preprocessor_config.json: ours, transformers' of every age, and what is wrong with others."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.interop.pictures import CHINA, THEIRS, assert_alike, by_both, transformers
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.auto import AutoImageProcessor
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.pretrained import processor_dict
from vitscale.models.configuration import ViTConfig

FLAGS = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")


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


@by_both
@pytest.mark.parametrize("size", [50, [50, 40], {"height": 50, "width": 30}, {"shortest_edge": 40}, None], ids=str)
@pytest.mark.parametrize("square", [True, False, None])
def test_a_side_need_not_make_a_square(tmp_path: Path, size: object, square: bool | None, backend: str) -> None:
    """default_to_square says what one number is: both sides, or the shorter one."""
    content = {"default_to_square": square} | ({} if size is None else {"size": size})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    image = CHINA.resize((90, 60))
    ours, theirs = (each.from_pretrained(tmp_path) for each in (ViTImageProcessor, THEIRS[backend]))
    assert_alike(ours(image, return_tensors="np"), theirs(image, return_tensors="np"))


WRONG: dict[str, list[Any]] = {
    **{flag: ["no", 0, 1, [], {}] for flag in FLAGS},
    "size": [True, "224", 0, -1, 9.5, [], [1, 2, 3], [True, 4], {}, {"height": 4}, {"height": True, "width": 4}],
    "resample": ["sharp", 17, True, [], {}, 1.5],
    "rescale_factor": ["x", True, [1], {}, [], float("nan"), float("inf"), 10**400],
    "image_mean": [["a"], {"a": 1}, "555", True, [], [True], [[1]], [None], [10**400]],
    "image_std": [["a"], {"a": 1}, "555", True, [], [float("nan")]],
    "default_to_square": ["no", [], {}],
    "data_format": ["channels_last", False, []],
    "do_pad": [0, 0.0, "", [], {}, True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_values_of_the_wrong_kind(key: str, value: object) -> None:
    """One line that names the file, the key and, where the key is ours, the value and the rule."""
    with pytest.raises(CheckpointError) as error:
        ViTImageProcessor.from_dict({key: value}, "there.json")
    ours = key in {field.name for field in fields(ViTImageProcessor)}
    assert re.match(rf"there\.json: {f'{key}=.*: must be ' if ours else rf'key.* {key} ask'}", str(error.value))
    assert "\n" not in str(error.value)


THREE = [0.5, 1.0, 0.25]


@pytest.mark.parametrize("value", [THREE, np.array(THREE), torch.tensor(THREE), np.array(0.5), 1])
def test_numbers_in_any_container(value: Any) -> None:
    expected = tuple(np.ravel(value).tolist())
    found = ViTImageProcessor(image_std=value, do_normalize=False).to_dict()["image_std"]
    assert tuple(np.ravel(found).tolist()) == expected
    json.dumps(found)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    for content, said in (
        ({"image_processor_type": "BeitImageProcessor"}, "BeitImageProcessor.*must be one of"),
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


@pytest.mark.parametrize("name", ["CLIP", "Bit", "DeiT"])
def test_others_that_do_the_same_start_as_theirs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' own do not import without torchvision: these are their defaults as its source has them."""
    for kind in (f"{name}ImageProcessor", f"{name}ImageProcessorFast"):
        made = ViTImageProcessor.from_dict({"image_processor_type": kind, "note": "of mine"}, "there.json")
        assert made.output_size == (224, 224)
        assert made.resample == Image.Resampling.BICUBIC
        assert made.size == ({"height": 256, "width": 256} if name == "DeiT" else {"shortest_edge": 224})
        assert capsys.readouterr().err == f"there.json: passed over, no keys of a {kind}: note\n"


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
