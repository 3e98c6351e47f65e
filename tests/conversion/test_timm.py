"""timm's models and ours: the same numbers by folders written from either side, and every vit_* known or refused."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models.shapes import DECODER, TINY
from vitscale.conversion.timm import is_timm, read_timm, write_timm
from vitscale.conversion.timm_architectures import EVA, VIT, arguments_of
from vitscale.conversion.timm_inputs import input_content, processor_of
from vitscale.conversion.vision_transformer import Opened, state_of
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.image_processing import ViTImageProcessor, processor_dict
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.mae import ViTMAEConfig, ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

timm = pytest.importorskip("timm")

PLAIN, SWIGLU, GAP = "vit_tiny_patch16_224", "vit_giant_patch14_dinov2", "vit_base_patch16_gap_224"
SMALL: dict[str, Any] = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL |= {"num_classes": 5}
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


def shaken(model: nn.Module) -> Any:
    """Random values in every parameter, so that no bias, token or position is 0 and no norm 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_timm(architecture: str, **arguments: Any) -> Any:
    return shaken(timm.create_model(architecture, **SMALL | arguments))


def save_theirs(model: nn.Module, folder: Path) -> Path:
    """As timm's own export (push_to_hf_hub) does."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


def open_theirs(folder: Path) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def opened_ours(model_class: type[ViTPreTrainedModel] = ViTForImageClassification, **keys: Any) -> Opened:
    config = model_class.config_class(**TINY | {"layer_norm_eps": 1e-6, "encoder_stride": 4, "num_labels": 5} | keys)
    model = model_class(config)
    initialize(model, 0)
    return Opened("hf", shaken(model), processor(config), 0)


def processor(config: ViTConfig) -> ViTImageProcessor:
    return ViTImageProcessor.from_dict(processor_dict(config, (0.5,), (0.25,)))


@torch.no_grad()
def assert_equal(ours: ViTPreTrainedModel, theirs: Any) -> None:
    """Every token's features, and the logits (without a head: the pooled features)."""
    size = ours.config.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    x = torch.randn(3, ours.config.num_channels, height, width, generator=torch.Generator().manual_seed(2))
    features = theirs.forward_features(x)
    if isinstance(ours, ViTModel):
        close(ours(x).last_hidden_state, features)
        return
    close(ours.vit(x).last_hidden_state, features)  # type: ignore[operator]
    if isinstance(ours, ViTForImageClassification):
        close(ours(x).logits, theirs(x))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5), (ours - theirs).abs().max()


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


# ---------------------------------------------------------------- architectures
class Asked(Exception):
    """What an architecture's function asks timm's builder for."""


def constructor_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """The class and every argument, defaults filled in, that timm would build this architecture with."""
    entry = timm.models.model_entrypoint(name)

    def stop(model_class: type, variant: str, pretrained: bool, **arguments: Any) -> None:
        raise Asked(model_class, arguments)

    monkeypatch.setattr(sys.modules[entry.__module__], "build_model_with_cfg", stop)
    with pytest.raises(Asked) as asked:
        entry(pretrained=False)
    model_class, arguments = asked.value.args
    usual = {key: item.default for key, item in inspect.signature(model_class.__init__).parameters.items()}
    return model_class.__name__, usual | arguments


def expressible(kind: str, said: dict[str, Any]) -> bool:
    """By the constructor's arguments, whether a ViTConfig has all of it."""
    norm = said["norm_layer"]
    if kind not in (VIT, EVA) or said["global_pool"] not in ("token", "avg", ""):
        return False
    if norm is not None and getattr(norm, "func", norm) is not timm.layers.LayerNorm:
        return False
    if kind == VIT:
        plain = {key: said[key] for key in ("pre_norm", "scale_attn_norm", "scale_mlp_norm", "pool_include_prefix")}
        known = said["block_fn"] is timm.models.vision_transformer.Block and said["final_norm"] and said["proj_bias"]
        parts = said["embed_layer"] is timm.layers.PatchEmbed and said["attn_layer"] is timm.layers.Attention
        mlp = said["mlp_layer"] in (timm.layers.Mlp, timm.layers.SwiGLUPacked)
        return known and parts and mlp and not any(plain.values()) and said["act_layer"] != "quick_gelu"
    rotary = said["use_rot_pos_emb"] and said["rope_type"] == "dinov3" and said["rope_rotate_half"]
    plain = {"use_pre_transformer_norm", "use_post_norm", "scale_mlp", "scale_attn_inner", "attn_only_layer_scale"}
    usual = said["qkv_fused"] and said["num_kv_heads"] is None and said["rope_grid_indexing"] == "ij"
    return rotary and usual and not any(said[key] for key in plain)


def test_every_vit_of_timm_is_known_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = timm.list_models("vit_*")
    assert len(names) > 200
    read = []
    for name in names:
        kind, said = constructor_arguments(name, monkeypatch)
        if not expressible(kind, said):
            with pytest.raises(CheckpointError, match=rf"'{name}': no ViTConfig can express"):
                arguments_of(name, {})
            continue
        found = arguments_of(name, {})
        read.append(name)
        assert (found["class"], found["num_heads"], found["global_pool"]) == (
            kind, said["num_heads"], said["global_pool"]
        ), name  # fmt: skip
        assert found["eps"] == getattr(said["norm_layer"], "keywords", {}).get("eps", 1e-6), name
        if kind == VIT:
            gated = said["mlp_layer"] is timm.layers.SwiGLUPacked
            assert (found.get("mlp_layer") == "SwiGLUPacked") == gated, name
            assert gated or found["act_layer"] == (said["act_layer"] or "gelu"), name
        else:
            assert found["rope_temperature"] == said["rope_temperature"], name
    sizes = ("tiny", "small", "base", "large", "huge")
    assert all(any(name.startswith(f"vit_{size}_patch") for name in read) for size in sizes)
    assert {"vit_base_patch14_reg4_dinov2", "vit_large_patch16_siglip_gap_512", "vit_7b_patch16_dinov3"} < set(read)


@pytest.mark.parametrize(
    ("architecture", "model_args", "reason"),
    [
        ("vit_base_patch16_clip_224", {}, "pre_norm=True"),
        ("vit_base_patch16_siglip_224", {}, "global_pool='map'"),
        ("vit_base_patch16_224", {"global_pool": "max"}, "global_pool='max'"),
        ("vit_base_patch16_224", {"norm_layer": "rmsnorm"}, "norm_layer='rmsnorm'"),
        ("vit_base_patch16_224", {"pool_include_prefix": True}, "pool_include_prefix=True"),
        ("vit_base_patch16_224", {"newer_thing": 3}, "newer_thing=3"),
        ("vit_relpos_base_patch16_224", {}, "VisionTransformerRelPos"),
        ("resnet50", {}, "is none of timm"),
        ("vit_base_patch16_of_tomorrow_224", {}, "is none of timm"),
    ],
)
def test_a_refusal_names_architecture_and_reason(architecture: str, model_args: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError) as error:
        arguments_of(architecture, model_args)
    assert architecture in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- folders
def test_tensors_are_used_or_named(tmp_path: Path) -> None:
    folder = save_theirs(tiny_timm(PLAIN), tmp_path)
    weights = load_file(folder / "model.safetensors")
    for change, expected in (
        ({"dist_token": torch.zeros(1, 1, 32)}, "unexpected: dist_token"),
        ({"blocks.1.norm2.weight": None}, "missing: blocks.1.norm2.weight"),
        ({"head.bias": torch.zeros(4)}, r"of another shape: head.bias \[4\] instead of \[5\]"),
        ({"pos_embed": torch.zeros(1, 20, 32)}, "pos_embed has 20 positions; .*need 15, or 16"),
        ({"blocks.0.attn.v_bias": torch.zeros(32)}, "unexpected: blocks.0.attn.v_bias"),
        ({"blocks.0.mlp.fc1.weight": None}, "missing: blocks.0.mlp.fc1.weight"),
    ):
        changed = {name: value for name, value in (weights | change).items() if value is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=expected):
            read_timm(folder)


def test_a_gate_that_the_architecture_does_not_tell_is_refused(tmp_path: Path) -> None:
    folder = save_theirs(tiny_timm(SWIGLU), tmp_path)
    content = json.loads((folder / "config.json").read_text())
    content["architecture"] = PLAIN
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="gated"):
        read_timm(folder)


def test_half_precision_and_a_pickle_are_read(tmp_path: Path) -> None:
    theirs = tiny_timm(PLAIN).half().float()  # numbers that halves have
    save_theirs(theirs, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: value.half() for name, value in theirs.state_dict().items()}, tmp_path / "pytorch_model.bin")
    opened = read_timm(tmp_path)
    assert next(opened.model.parameters()).dtype == torch.float32
    assert_equal(opened.model, theirs)


def test_a_config_of_the_time_before_pretrained_cfg(tmp_path: Path) -> None:
    theirs = tiny_timm(PLAIN, img_size=32, patch_size=16, embed_dim=48, num_heads=3)
    save_theirs(theirs, tmp_path)
    old = {"architecture": PLAIN, "num_features": 48, "num_classes": 5, "input_size": [3, 32, 32], "mean": [0.1] * 3}
    old |= {"std": [0.2] * 3, "crop_pct": 0.9, "interpolation": "bicubic", "labels": ["a", "b", "c", "d", "e"]}
    (tmp_path / "config.json").write_text(json.dumps(old))
    opened = read_timm(tmp_path)
    assert_equal(opened.model, theirs)
    assert opened.model.config.id2label == dict(enumerate("abcde"))
    assert opened.processor.image_mean == (0.1,) * 3


def test_names_of_labels_go_both_ways(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "eel"]
    timm.models.save_for_hf(tiny_timm(PLAIN), tmp_path, {"label_names": names}, safe_serialization=True)
    assert read_timm(tmp_path).model.config.id2label == dict(enumerate(names))
    timm.models.save_for_hf(tiny_timm(PLAIN), tmp_path, {"label_names": names[:3]}, safe_serialization=True)
    opened = read_timm(tmp_path)
    assert opened.model.config.id2label is None
    assert "label_names: 3 names for 5 classes are left out" in opened.notes


def test_whose_config_it_is() -> None:
    assert is_timm({"architecture": PLAIN, "pretrained_cfg": {}})
    assert not is_timm({"model_type": "vit", "architectures": ["ViTModel"]})


# ---------------------------------------------------------------- images
@pytest.mark.parametrize(
    ("size", "content"),
    [
        (72, {"crop_pct": 0.9}),
        (56, {"crop_pct": 0.875, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}),
        (64, {"crop_pct": 1.0, "interpolation": "lanczos"}),
        (64, {"crop_pct": 0.8, "crop_mode": "squash"}),
        ((24, 40), {"crop_pct": 1.0, "crop_mode": "squash"}),
    ],
)
@pytest.mark.parametrize("picture", [(41, 82), (150, 100), (64, 64)])  # what is cut is even: see processor_of
def test_images_become_what_timm_makes_of_them(
    size: int | tuple[int, int], content: dict[str, Any], picture: tuple[int, int]
) -> None:
    height, width = size if isinstance(size, tuple) else (size, size)
    usual: dict[str, Any] = {"input_size": [3, height, width], "interpolation": "bicubic"}
    content = usual | {"mean": [0.5] * 3, "std": [0.5] * 3} | content
    ours, notes = processor_of(content, ViTConfig(image_size=size, patch_size=8))
    assert notes == []
    pixels = np.random.default_rng(0).integers(0, 256, (*picture, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((picture[1], picture[0]))
    theirs = timm.data.create_transform(**content)(image)
    found = ours(image, return_tensors="pt").pixel_values[0]
    assert found.shape == theirs.shape
    assert torch.allclose(found, theirs, atol=1.01 / 255 / min(content["std"])), (found - theirs).abs().max()

    back = input_content(ours, ViTConfig(image_size=size, patch_size=8))
    again = timm.data.create_transform(**{key: back[key] for key in back if key != "fixed_input_size"})(image)
    assert torch.allclose(again, theirs, atol=1e-6)


def test_an_images_way_that_only_one_side_has() -> None:
    config = ViTConfig(image_size=(24, 40), patch_size=8)
    ours, notes = processor_of({"crop_mode": "center", "crop_pct": 0.9, "interpolation": "random"}, config)
    assert ours.size == {"height": 24, "width": 40}
    assert len(notes) == 2
    with pytest.raises(ConfigError, match="timm's transform cannot"):
        input_content(ViTImageProcessor(size={"shortest_edge": 24}), config)
    with pytest.raises(CheckpointError, match=r"mean=.*4 channels"):
        processor_of({"mean": [0.5, 0.5, 0.5]}, ViTConfig(num_channels=4))


def test_another_scale_of_pixels_is_another_mean() -> None:
    plain = ViTImageProcessor(size=224, rescale_factor=1 / 127.5, image_mean=1.0, image_std=0.5)
    content = input_content(plain, ViTConfig())
    assert content["mean"] == pytest.approx([0.5] * 3)
    assert content["std"] == pytest.approx([0.25] * 3)


def test_a_config_of_mae_is_read_as_an_encoder(tmp_path: Path) -> None:
    write_timm(tmp_path, opened_ours(ViTMAEForPreTraining, **DECODER, num_labels=2))
    again = read_timm(tmp_path).model
    assert type(again.config) is ViTConfig
    assert not isinstance(again.config, ViTMAEConfig)
    assert again.config.num_labels == 0
