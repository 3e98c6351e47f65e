"""ViTConfig: what it refuses, and how it goes through config.json, ours and transformers'."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.models.shapes import DECODER, EVERY_OPTION, TINY
from vitscale.errors import ConfigError
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import OPTIONS, ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling


@pytest.mark.parametrize("keys", [
    {"image_size": 30}, {"image_size": (16, 18)}, {"num_attention_heads": 3}, {"hidden_act": "gelo"},
    {"num_attention_heads": 0}, {"num_hidden_layers": 0}, {"num_channels": 0}, {"num_labels": -1},
    {"position_embeddings": "rope"}, {"hidden_size": 18, "position_embeddings": "sincos"},
    {"image_size": 10**9}, {"hidden_size": 10**12}, {"num_hidden_layers": 10**9}, {"image_size": 1 << 17},
    {"drop_path_rate": 1.0}, {"problem_type": "regress"}, {"pooling": "max"}, {"num_register_tokens": -1},
    {"use_cls_token": False}, {"rope_theta": 0.0}, {"hidden_size": 12, "rope_theta": 100.0},
    {"problem_type": "regression", "label_smoothing": 0.1},
    {"problem_type": "single_label_classification", "num_labels": 1},
    {"hidden_size": 16.0}, {"hidden_size": "16"}, {"num_register_tokens": 1.5}, {"num_hidden_layers": True},
    {"hidden_dropout_prob": 2}, {"attention_probs_dropout_prob": "a"}, {"layer_norm_eps": -1}, {"layer_norm_eps": "x"},
    {"initializer_range": float("nan")}, {"qkv_bias": "false"}, {"qkv_bias": 1}, {"pooler_output_size": -1},
    {"pooler_output_size": 0}, {"mask_ratio": 7}, {"mask_patch": 0}, {"label_smoothing": 1.0}, {"encoder_stride": 0},
    {"image_size": "abc"}, {"image_size": (16, 16, 16)}, {"image_size": -16}, {"patch_size": None}, {"patch_size": []},
    {"pooler_act": "prelu"}, {"head_dim": 0}, {"id2label": ["cat"]}, {"id2label": {1: "a", 2: "b", 7: "c"}},
    {"id2label": {"a": "b"}}, {"id2label": {0: 1}}, {"label2id": {"a": 1, "b": 2}},
    {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, {"output_attentions": "yes"},
    {"num_labels": 10**12},
])  # fmt: skip
def test_impossible_configs(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be") as caught:
        ViTConfig(**TINY | keys)
    assert str(caught.value).splitlines() == [str(caught.value)]
    assert str(caught.value).split("=")[0] in {*keys, "image_size", "hidden_size", "pooling", "id2label"}


def test_values_become_what_the_annotation_says() -> None:
    config = ViTConfig(**TINY | {"layer_norm_eps": 1, "image_size": [16, 32], "hidden_size": np.int64(32)})
    assert (config.layer_norm_eps, config.image_size, config.hidden_size) == (1.0, (16, 32), 32)
    assert [type(value) for value in (config.layer_norm_eps, config.hidden_size)] == [float, int]
    assert ViTConfig(id2label={"1": "b", "0": "a"}).id2label == {0: "a", 1: "b"}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("key", "value"),
    [("return_dict", False), ("quantization_config", {"load_in_8bit": True}), ("pruned_heads", {"0": [1]})],
)
def test_keys_of_transformers_that_change_what_comes_out(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        ViTConfig.from_dict(TINY | {key: value})
    assert ViTConfig.from_dict(TINY | {key: None}) == ViTConfig(**TINY)


def test_keys_that_transformers_ignores_are_passed_over() -> None:
    content = TINY | {"model_type": "vit", "return_dict": True, "_name_or_path": "x", "torchscript": False}
    strangers = {"decoder_hidden_size": 512, "norm_pix_loss": True, "hiden_size": 7, "my_note": {"a": 1}}
    assert ViTConfig.from_dict(content | strangers) == ViTConfig(**TINY)
    assert ViTConfig.ignored_keys(content | strangers) == [
        "decoder_hidden_size",
        "hiden_size",
        "my_note",
        "norm_pix_loss",
    ]
    assert (
        ViTConfig.ignored_keys(content | {"quantization_config": None, "is_decoder": False, "bad_words_ids": None})
        == []
    )
    with pytest.raises(ConfigError, match=r"unknown key\(s\) hiden_size.*a later version"):  # only we read such a file
        ViTConfig.from_dict(content | {"model_type": "vitscale_vit", "hiden_size": 7})


@pytest.mark.parametrize(
    ("key", "value"),
    [("pooling", "mean"), ("pooling", "avg"), ("rope_theta", 1e4), ("swiglu", True), ("use_cls_token", False),
     ("num_register_tokens", 4), ("layer_scale_init_value", 1e-5), ("position_embeddings", "rotary")],
)  # fmt: skip
def test_our_names_in_files_of_others_are_passed_over(key: str, value: Any) -> None:
    content = TINY | {"model_type": "vit", key: value}
    assert ViTConfig.from_dict(content) == ViTConfig(**TINY)
    assert ViTConfig.ignored_keys(content) == [key]


def test_our_options_in_files_of_ours_stay() -> None:
    config = ViTConfig(**TINY, pooling="mean", rope_theta=100.0, num_register_tokens=2)
    assert ViTConfig.from_dict(config.to_dict()) == config
    for options in ({"pooling": "mean"}, {"pooling": "mean", "rope_theta": 100.0}):  # vit_mae, vitscale_vit_mae
        mae = ViTMAEConfig(**TINY | DECODER | options)
        assert ViTMAEConfig.from_dict(mae.to_dict()) == mae


def test_labels_that_only_transformers_would_take() -> None:
    names = {"0": "cat", "1": "dog"}
    for label2id in ({"cat": 1, "dog": 0}, {"LABEL_0": 0}, {"cat": "one"}):
        config = ViTConfig.from_dict(TINY | {"id2label": names, "label2id": label2id})
        assert config.label2id == {"cat": 0, "dog": 1}
    assert ViTConfig.from_dict(TINY | {"id2label": names, "label2id": {"cat": "0", "dog": "1"}}).num_labels == 2
    assert ViTConfig.from_dict(TINY | {"id2label": names, "label2id": ["cat", "dog"]}).label2id == {"cat": 0, "dog": 1}
    assert ViTConfig.from_dict(TINY | {"id2label": {"0": 3, "1": 7}}).id2label == {0: "3", 1: "7"}


@pytest.mark.parametrize("keys", [
    {"decoder_hidden_size": 9}, {"decoder_hidden_size": 6}, {"mask_ratio": 0.99}, {"fc_norm": True},
    {"position_embeddings": "none"}, {"decoder_num_attention_heads": 4, "rope_theta": 100.0},
    {"patch_size": 1, "num_channels": 1, "norm_pix_loss": True}, {"decoder_num_hidden_layers": 0},
    {"norm_pix_loss": "maybe"}, {"head_dim": 8},
])  # fmt: skip
def test_impossible_autoencoders(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        ViTMAEConfig(**TINY | DECODER | keys)


@pytest.mark.parametrize("model_class", [ViTForMaskedImageModeling, ViTForMultitaskPreTraining])
def test_what_a_masked_image_model_refuses(model_class: type) -> None:
    for keys in ({"fc_norm": True}, {"position_embeddings": "none"}, {"encoder_stride": 8}):
        with pytest.raises(ConfigError, match=f"{next(iter(keys))}=.*must be"):
            model_class(ViTConfig(**TINY | {"encoder_stride": 4} | keys))
    with pytest.raises(ConfigError, match="problem_type"):
        ViTForMultitaskPreTraining(ViTConfig(**TINY, encoder_stride=4, problem_type="regression"))


def test_keys_and_defaults_are_those_of_transformers() -> None:
    ours = {item.name: item.default for item in fields(ViTConfig)}
    theirs = transformers.ViTConfig()
    own = set(transformers.ViTConfig().to_dict()) & set(ours)
    assert {"hidden_size", "image_size", "qkv_bias", "encoder_stride", "pooler_act", "problem_type"} <= own
    for name in own - {"id2label", "label2id", "pooler_output_size"}:
        assert ours[name] == getattr(theirs, name), name
    assert ours["num_labels"] == theirs.num_labels
    assert theirs.pooler_output_size == theirs.hidden_size  # what our None means
    mae, theirs_mae = ViTMAEConfig(), transformers.ViTMAEConfig()
    for name in {item.name for item in fields(ViTMAEConfig)} & set(theirs_mae.to_dict()) - {"id2label", "label2id"}:
        assert getattr(mae, name) == getattr(theirs_mae, name), name


def test_config_goes_through_json() -> None:
    config = ViTConfig(**TINY | {"image_size": (16, 32), "num_labels": 7, "drop_path_rate": 0.1})
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="vit_mae"):
        ViTMAEConfig.from_dict(config.to_dict())
    with pytest.raises(ConfigError, match="needs a ViTMAEConfig"):
        ViTMAEForPreTraining(config)


def test_labels_by_name() -> None:
    named = ViTConfig.from_dict({"id2label": {"0": "cat", "1": "dog", "2": "cow"}, "transformers_version": "5.0"})
    assert (named.num_labels, named.label2id) == (3, {"cat": 0, "dog": 1, "cow": 2})
    assert named.to_dict()["label2id"] == {"cat": 0, "dog": 1, "cow": 2}
    assert ViTConfig.from_dict(named.to_dict()) == named
    back = ViTConfig(label2id={"cat": 0, "dog": 1})
    assert (back.num_labels, back.id2label) == (2, {0: "cat", 1: "dog"})
    # Two classes of one name, as ImageNet has: both are kept as they were given.
    twice = ViTConfig(id2label={0: "crane", 1: "crane"}, label2id={"crane": 1})
    assert (twice.num_labels, twice.label2id) == (2, {"crane": 1})
    assert ViTConfig.from_dict(twice.to_dict()) == twice
    assert ViTConfig(num_labels=0).to_dict()["num_labels"] == 0


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_labels_without_names_are_called_as_transformers_calls_them(count: int) -> None:
    ours, theirs = ViTConfig(num_labels=count), transformers.ViTConfig(num_labels=count)
    assert (ours.id2label or {}, ours.label2id or {}) == (theirs.id2label, theirs.label2id)
    assert not ours.has_class_names
    assert ours.to_dict()["num_labels"] == count
    assert "id2label" not in ours.to_dict()
    assert ViTConfig.from_dict(ours.to_dict()) == ours
    assert ViTConfig(id2label={0: "cat"}).has_class_names


@pytest.mark.parametrize(("name", "value"), [
    *((name, EVERY_OPTION[name]) for name in EVERY_OPTION if name != "use_cls_token"),
    ("fc_norm", True), ("encoder_stride", (4, 8)),
])  # fmt: skip
def test_what_transformers_cannot_express(tmp_path: Path, name: str, value: Any) -> None:
    config = ViTConfig(**TINY, **{name: value})
    assert config.beyond_transformers == [name]
    assert config.to_dict()["model_type"] == "vitscale_vit"
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["ViTModel"]}))
    with pytest.raises(ValueError, match="vitscale_vit"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_every_option_is_told_and_off_by_default() -> None:
    assert ViTConfig(**TINY | EVERY_OPTION).beyond_transformers == [
        *(name for name in OPTIONS if name != "fc_norm"), "position_embeddings",
    ]  # fmt: skip
    plain = ViTConfig(**TINY)
    assert plain.beyond_transformers == []
    assert plain.to_dict()["model_type"] == "vit"
    assert ViTConfig(position_embeddings="sincos").beyond_transformers == []  # a table like any other on disk


def test_what_transformers_autoencoder_cannot_express() -> None:
    config = ViTMAEConfig(**TINY | DECODER | EVERY_OPTION)
    assert config.to_dict()["model_type"] == "vitscale_vit_mae"
    assert ViTMAEConfig.from_dict(config.to_dict()) == config
    assert ViTMAEConfig(**TINY | DECODER).to_dict()["model_type"] == "vit_mae"
    assert ViTMAEConfig(pooling="mean").beyond_transformers == []  # nothing is pooled there
    assert ViTMAEConfig(image_size=(32, 64)).beyond_transformers == ["image_size"]
    assert ViTMAEConfig(patch_size=(16, 32)).beyond_transformers == ["patch_size"]


def test_a_classifier_needs_its_config() -> None:
    with pytest.raises(ConfigError, match="hidden_act='gelo'"):
        ViTForImageClassification(ViTConfig(**TINY, hidden_act="gelo"))
