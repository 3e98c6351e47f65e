"""The model of a folder, told by its config.json; what is not ours is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vitscale
from tests.conversion.comparing import shaken
from tests.models.shapes import TRAINABLE, tiny
from vitscale.conversion.convert import convert
from vitscale.errors import CheckpointError
from vitscale.interop.auto import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
)
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

AUTO: list[Any] = [AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling]
AUTO += [AutoModelForPreTraining]


@pytest.mark.parametrize("model_class", [ViTModel, *TRAINABLE], ids=lambda c: c.__name__)
def test_every_model(tmp_path: Path, model_class: type[ViTPreTrainedModel]) -> None:
    ours = tiny(model_class).eval()
    ours.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path) == ours.config
    assert type(AutoModel.from_pretrained(tmp_path)) is ViTModel
    assert type(AutoModelForMaskedImageModeling.from_pretrained(tmp_path)) is ViTForMaskedImageModeling
    model, report = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert type(model) is ViTForImageClassification
    has_labels = model_class in (ViTForImageClassification, ViTForMultitaskPreTraining)
    assert report.fresh == ([] if has_labels else ["classifier.bias", "classifier.weight"])
    if model_class in (ViTMAEForPreTraining, ViTForMaskedImageModeling, ViTForMultitaskPreTraining):
        again = AutoModelForPreTraining.from_pretrained(tmp_path)
        assert type(again) is model_class
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
    else:
        with pytest.raises(CheckpointError, match=f"architectures names {model_class.__name__}, which is not for pre"):
            AutoModelForPreTraining.from_pretrained(tmp_path)


def test_whatever_is_a_model_opens_by_every_class(tmp_path: Path) -> None:
    """As a folder, as timm's, as MAE's file, and by the weights in a folder."""
    mae, classifier = (
        shaken(tiny(each, layer_norm_eps=1e-6)) for each in (ViTMAEForPreTraining, ViTForImageClassification)
    )
    own = ViTImageProcessor(size=16, image_mean=(0.1, 0.2, 0.3))
    for model, name in ((mae, "mae"), (classifier, "classifier")):
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}.pth", "mae")
    convert(tmp_path / "classifier", tmp_path / "timm", "timm")
    for name in ("classifier", "classifier/model.safetensors", "timm", "classifier.pth"):
        source, keys = tmp_path / name, {"num_attention_heads": 2} if name.endswith(".pth") else {}
        config = AutoConfig.from_pretrained(source)
        assert config == AutoModel.from_pretrained(source).config
        assert AutoConfig.from_pretrained(source, **keys, label_smoothing=0.1).label_smoothing == 0.1
        assert AutoImageProcessor.from_pretrained(source, **keys).image_mean == pytest.approx(own.image_mean)
        assert AutoImageProcessor.from_pretrained(source, do_resize=False).do_resize is False
        with pytest.raises(CheckpointError, match="ViTForImageClassification, which is not for pretraining"):
            AutoModelForPreTraining.from_pretrained(source)
    for name in ("mae", "mae.pth"):
        again = AutoModelForPreTraining.from_pretrained(tmp_path / name)
        assert all(torch.equal(value, mae.state_dict()[name]) for name, value in again.state_dict().items())
        assert AutoConfig.from_pretrained(tmp_path / name) == again.config
        assert type(AutoConfig.from_pretrained(tmp_path / name, config_class=ViTConfig)) is ViTConfig
    assert ViTMAEConfig.from_pretrained(tmp_path / "mae") == AutoConfig.from_pretrained(tmp_path / "mae")
    assert type(ViTConfig.from_pretrained(tmp_path / "mae")) is ViTConfig
    with pytest.raises(CheckpointError, match=r"AutoConfig.from_pretrained\(..., config_class=ViTConfig\) opens more"):
        ViTConfig.from_pretrained(tmp_path / "timm")


def test_a_config_with_other_keys(tmp_path: Path) -> None:
    tiny(ViTMAEForPreTraining).config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, mask_ratio=0.5)
    assert type(config) is ViTMAEConfig
    assert config.mask_ratio == 0.5


def test_from_config() -> None:
    config = tiny(ViTForImageClassification).config
    assert type(AutoModel.from_config(config)) is ViTModel
    assert AutoModelForImageClassification.from_config(config).config is config


@pytest.mark.parametrize("auto", AUTO, ids=lambda c: c.__name__)
def test_models_that_are_not_ours(tmp_path: Path, auto: Any) -> None:
    for content, said in (
        ({"model_type": "bert"}, "model_type='bert': must be one of vit, vit_mae, vitscale_vit, vitscale_vit_mae"),
        ({"model_type": "swin", "architectures": ["SwinModel"]}, "ijepa; take a model of one of these, the same model"),
        ({"model_type": "vitscale_vit", "use_rope": True, "architectures": ["ViTModel"]}, "use_rope"),
        ({"model_type": "vit", "image_size": "large"}, "config.json"),
        ({"model_type": "vit", "image_size": 30}, "image_size=30: must be a multiple of patch_size=16"),
        ({"model_type": ["vit"]}, "model_type=['vit']"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError) as error:
            auto.from_pretrained(tmp_path)
        assert said in str(error.value)
        assert "\n" not in str(error.value)
        assert str(tmp_path / "config.json") in str(error.value)
    for text in ("{", "[]", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            auto.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        auto.from_pretrained(tmp_path)


def test_what_older_writers_left_in_a_config(tmp_path: Path) -> None:
    """Keys of transformers 3 and 4, with the values that change nothing; with others they are refused."""
    content = {"model_type": "vit", "architectures": ["ViTModel"], "torch_dtype": "float32", "_name_or_path": "x"}
    content |= {"finetuning_task": "image-classification", "gradient_checkpointing": False, "pruned_heads": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert AutoConfig.from_pretrained(tmp_path) == ViTConfig()
    (tmp_path / "config.json").write_text(json.dumps(content | {"pruned_heads": {"0": [1]}}))
    with pytest.raises(CheckpointError, match="pruned_heads"):
        AutoConfig.from_pretrained(tmp_path)


def test_they_are_public() -> None:
    names = {auto.__name__ for auto in AUTO} | {"ViTImageProcessor", "AutoImageProcessor"}
    assert names <= set(dir(vitscale))
    assert all(getattr(vitscale, name).from_pretrained for name in names)
