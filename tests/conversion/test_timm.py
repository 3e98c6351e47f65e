"""timm's models and ours: the same numbers by folders written from either side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion.comparing import close
from tests.conversion.timm_models import (
    GAP,
    PLAIN,
    SWIGLU,
    assert_equal,
    open_theirs,
    opened_ours,
    save_theirs,
    tiny_timm,
)  # fmt: skip
from tests.models.shapes import DECODER
from vitscale.conversion.timm import write_timm
from vitscale.errors import ConfigError
from vitscale.interop.timm import read_timm
from vitscale.interop.vision_transformer import state_of
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.vit import ViTModel

# What timm is asked for -> what our config must then say.
THEIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": (PLAIN, {}, {"pooling": "cls", "layer_norm_eps": 1e-6, "image_size": (24, 40)}),
    "square": (PLAIN, {"img_size": 32, "patch_size": 16}, {"image_size": 32, "patch_size": 16}),
    "patches_of_4x8": (PLAIN, {"patch_size": (4, 8)}, {"patch_size": (4, 8)}),
    "avg": (PLAIN, {"global_pool": "avg"}, {"pooling": "mean", "fc_norm": True}),
    "avg_norm_first": (PLAIN, {"global_pool": "avg", "fc_norm": False}, {"pooling": "mean", "fc_norm": False}),
    "token_fc_norm": (PLAIN, {"fc_norm": True}, {"pooling": "cls", "fc_norm": True}),
    "no_pooling": (PLAIN, {"global_pool": "", "num_classes": 0}, {}),
    "no_class_token": (GAP, {}, {"use_cls_token": False, "pooling": "mean", "fc_norm": False}),
    "features": (PLAIN, {"num_classes": 0}, {"num_labels": 0}),
    "registers": (PLAIN, {"reg_tokens": 3, "no_embed_class": True}, {"num_register_tokens": 3}),
    "registers_with_positions": (PLAIN, {"reg_tokens": 3}, {"num_register_tokens": 3}),
    "registers_alone": ("vit_betwixt_patch16_reg4_gap_256", {}, {"num_register_tokens": 4, "use_cls_token": False}),
    "registers_alone_with_positions": (GAP, {"reg_tokens": 2}, {"num_register_tokens": 2, "use_cls_token": False}),
    "no_positions": (PLAIN, {"pos_embed": "none"}, {"position_embeddings": "none"}),
    "layer_scale": (PLAIN, {"init_values": 0.1}, {"layer_scale_init_value": 0.1}),
    "qk_norm": (PLAIN, {"qk_norm": True}, {"qk_norm": True}),
    "no_qkv_bias": (PLAIN, {"qkv_bias": False}, {"qkv_bias": False}),
    "four_channels": (PLAIN, {"in_chans": 4}, {"num_channels": 4}),
    "gelu_tanh": ("vit_base_patch32_siglip_gap_256", {}, {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": (PLAIN, {"act_layer": "relu"}, {"hidden_act": "relu"}),
    "mlp_ratio": (PLAIN, {"mlp_ratio": 2.572}, {"intermediate_size": 82}),
    "eps_1e-5": ("vit_base_patch16_clip_224", {"pre_norm": False}, {"layer_norm_eps": 1e-5}),
    "swiglu": (SWIGLU, {"mlp_ratio": 3}, {"swiglu": True, "intermediate_size": 48, "layer_scale_init_value": 1e-5}),
    "dinov3": ("vit_small_patch16_dinov3", {}, {"rope_theta": 100.0, "num_register_tokens": 4, "qkv_bias": False}),
    "dinov3_qkvb": ("vit_tiny_patch16_dinov3_qkvb", {}, {"qkv_bias": True, "position_embeddings": "none"}),
    "dinov3_plus": ("vit_small_plus_patch16_dinov3", {"mlp_ratio": 2.5}, {"swiglu": True, "intermediate_size": 80}),
    "lingbot": ("vit_small_patch16_lingbot", {}, {"pooling": "cls", "layer_norm_eps": 1e-5}),
    "rotary_and_learned": (
        "vit_base_patch16_dinov3",
        {"use_abs_pos_emb": True, "attn_type": "rope", "qkv_bias": True, "qk_norm": True, "use_fc_norm": True},
        {"position_embeddings": "learned", "qk_norm": True, "fc_norm": True, "qkv_bias": True},
    ),
}  # fmt: skip
# Our keys -> what stands in timm's model_args for them.
OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"img_size": [16, 16], "patch_size": [4, 4]}),
    "not_square": ({"image_size": (16, 24), "patch_size": (4, 8)}, {"img_size": [16, 24], "patch_size": [4, 8]}),
    "mean": ({"pooling": "mean"}, {"global_pool": "avg", "fc_norm": False}),
    "fc_norm": ({"pooling": "mean", "fc_norm": True}, {"fc_norm": True}),
    "no_cls": ({"use_cls_token": False, "pooling": "mean"}, {"class_token": False}),
    "registers": ({"num_register_tokens": 3}, {"reg_tokens": 3}),
    "registers_alone": ({"use_cls_token": False, "pooling": "mean", "num_register_tokens": 2}, {"reg_tokens": 2}),
    "sincos": ({"position_embeddings": "sincos"}, {"pos_embed": "learn"}),
    "no_positions": ({"position_embeddings": "none"}, {"pos_embed": "none"}),
    "layer_scale": ({"layer_scale_init_value": 0.0}, {"init_values": 1e-5}),
    "options": ({"qk_norm": True, "qkv_bias": False, "num_channels": 1}, {"qk_norm": True, "qkv_bias": False}),
    "gelu_new": ({"hidden_act": "gelu_new"}, {"act_layer": "gelu_tanh"}),
    "tanh": ({"hidden_act": "tanh"}, {"act_layer": "tanh"}),
    "eps_1e-5": ({"layer_norm_eps": 1e-5}, {"pre_norm": False}),
    "swiglu": ({"swiglu": True, "intermediate_size": 23}, {}),
    "rope": ({"rope_theta": 50.0, "position_embeddings": "none"}, {"rope_temperature": 50.0, "use_abs_pos_emb": False}),
    "rope_eps": ({"rope_theta": 100.0, "layer_norm_eps": 1e-5, "num_register_tokens": 2}, {"use_abs_pos_emb": True}),
    "rope_swiglu": (
        {"rope_theta": 100.0, "swiglu": True, "fc_norm": True, "pooling": "mean", "layer_scale_init_value": 1e-4,
         "qk_norm": True},
        {"swiglu_mlp": True, "use_fc_norm": True},
    ),
    "no_head": ({"num_labels": 0}, {"global_pool": "token"}),
    "names": ({"id2label": {0: "cat", 1: "dog"}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", THEIRS)
def test_their_folder_opens_here_and_goes_back(tmp_path: Path, kind: str) -> None:
    architecture, arguments, expected = THEIRS[kind]
    theirs = tiny_timm(architecture, **arguments)
    opened = read_timm(save_theirs(theirs, tmp_path / "theirs"))
    config = opened.model.config
    assert {key: getattr(config, key) for key in expected} == expected
    assert type(opened.model) is (ViTModel if arguments.get("global_pool") == "" else ViTForImageClassification)
    assert opened.tensors == len(theirs.state_dict())
    assert_equal(opened.model, theirs)

    left_out, notes = write_timm(tmp_path / "back", opened)
    assert (left_out, notes) == ([], [])
    assert_equal(opened.model, open_theirs(tmp_path / "back"))
    again = read_timm(tmp_path / "back").model
    if kind != "no_pooling":  # a folder of ours says how it would pool
        assert again.config == config
        assert all(torch.equal(value, state_of(opened.model)[name]) for name, value in state_of(again).items())


@pytest.mark.parametrize("kind", OURS)
def test_our_folder_opens_there_and_goes_back(tmp_path: Path, kind: str) -> None:
    keys, expected = OURS[kind]
    opened = opened_ours(**keys)
    left_out, notes = write_timm(tmp_path, opened)
    assert (left_out, notes) == ([], [])
    content = json.loads((tmp_path / "config.json").read_text())
    assert {key: content["model_args"][key] for key in expected} == expected
    theirs = open_theirs(tmp_path)
    assert_equal(opened.model, theirs)
    assert theirs.num_classes == opened.model.config.num_labels
    again = read_timm(tmp_path)
    assert_equal(again.model, theirs)
    assert again.model.config.id2label == opened.model.config.id2label
    assert again.processor == opened.processor


def test_a_decoder_and_a_pooler_stay_out_and_are_named(tmp_path: Path) -> None:
    mae = opened_ours(ViTMAEForPreTraining, **DECODER, num_labels=2)
    left_out, _ = write_timm(tmp_path / "mae", mae)
    assert sorted(left_out) == sorted(name for name in state_of(mae.model) if name.startswith("decoder."))
    assert_equal(mae.model, open_theirs(tmp_path / "mae"))
    encoder = opened_ours(ViTModel)
    left_out, _ = write_timm(tmp_path / "encoder", encoder)
    assert left_out == ["vit.pooler.dense.weight", "vit.pooler.dense.bias"]
    assert_equal(encoder.model, open_theirs(tmp_path / "encoder"))
    both = opened_ours(ViTForMultitaskPreTraining)
    left_out, _ = write_timm(tmp_path / "both", both)
    assert left_out == ["vit.embeddings.mask_token", "decoder.0.weight", "decoder.0.bias"]
    theirs = open_theirs(tmp_path / "both")
    assert_equal(both.model, theirs)
    x = torch.randn(2, 3, 16, 16)
    close(both.model.eval()(x).logits, theirs(x))


def test_an_eps_that_timm_has_not_is_said(tmp_path: Path) -> None:
    _, notes = write_timm(tmp_path, opened_ours(layer_norm_eps=1e-12))
    assert len(notes) == 1
    assert "layer_norm_eps=1e-12 became 1e-06" in notes[0]


def test_what_timm_cannot_express_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hidden_act='relu'.*rotary"):
        write_timm(tmp_path / "out", opened_ours(rope_theta=100.0, hidden_act="relu"))
    with pytest.raises(ConfigError, match=r"head_dim=8.*share out"):  # pruned heads
        write_timm(tmp_path / "out", opened_ours(num_attention_heads=1, head_dim=8))
    assert not (tmp_path / "out").exists()


def test_a_config_of_mae_is_read_as_an_encoder(tmp_path: Path) -> None:
    write_timm(tmp_path, opened_ours(ViTMAEForPreTraining, **DECODER, num_labels=2))
    again = read_timm(tmp_path).model
    assert type(again.config) is ViTConfig
    assert not isinstance(again.config, ViTMAEConfig)
    assert again.config.num_labels == 0
