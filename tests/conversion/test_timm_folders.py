"""What stands in a timm folder: used, or named in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.timm_models import PLAIN, SWIGLU, assert_equal, save_theirs, tiny_timm
from vitscale.errors import CheckpointError
from vitscale.interop.timm import is_timm, read_timm

timm = pytest.importorskip("timm")


def test_tensors_are_used_or_named(tmp_path: Path) -> None:
    folder = save_theirs(tiny_timm(PLAIN), tmp_path)
    weights = load_file(folder / "model.safetensors")
    changes: tuple[tuple[dict[str, torch.Tensor | None], str], ...] = (
        ({"dist_token": torch.zeros(1, 1, 32)}, "unexpected: dist_token"),
        ({"blocks.1.norm2.weight": None}, "missing: blocks.1.norm2.weight"),
        ({"head.bias": torch.zeros(4)}, r"of another shape: head.bias \[4\] instead of \[5\]"),
        ({"pos_embed": torch.zeros(1, 20, 32)}, "pos_embed has 20 positions; .*need 15, or 16"),
        ({"blocks.0.attn.v_bias": torch.zeros(32)}, "unexpected: blocks.0.attn.v_bias"),
        ({"blocks.0.mlp.fc1.weight": None}, "missing: blocks.0.mlp.fc1.weight"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(())}, r"fc1.weight \[\] instead of 2 dimensions"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3)}, r"patch_embed.proj.weight \[32, 3\] instead of 4 dimensions"),
        ({"pos_embed": torch.zeros(16)}, r"pos_embed \[16\] instead of 3 dimensions"),
        ({"pos_embed": torch.zeros(1, 16, 3)}, r"pos_embed \[1, 16, 3\] instead of \[1, 16, 32\]"),
        ({"reg_token": torch.zeros(1, 2, 3)}, r"reg_token \[1, 2, 3\] instead of \[1, 2, 32\]"),
        ({"blocks.0.attn.q_bias": torch.zeros(()), "blocks.0.attn.v_bias": torch.zeros(())}, "unexpected: .*q_bias"),
    )
    for change, expected in changes:
        changed = {name: value for name, value in (weights | change).items() if value is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=expected):
            read_timm(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": (PLAIN, {}),
        "avg": (PLAIN, {"global_pool": "avg", "reg_tokens": 2, "no_embed_class": True}),
        "rotary": ("vit_small_plus_patch16_dinov3", {}),
    }
    made = tmp_path_factory.mktemp("timm")
    return {
        kind: save_theirs(tiny_timm(architecture, **arguments), made / kind)
        for kind, (architecture, arguments) in kinds.items()
    }


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy with other values in config.json, or within its model_args and pretrained_cfg."""
    shutil.copytree(folder, to)
    content = json.loads((to / "config.json").read_text())
    for key in ("model_args", "pretrained_cfg"):
        if isinstance(changes.get(key), dict):
            changes[key] = content[key] | changes[key]
    (to / "config.json").write_text(json.dumps(content | changes))
    return to


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        (
            "plain",
            {"depth": 5, "embed_dim": 64},
            r"embed_dim=64 \(the tensors have 32\), depth=5 \(the tensors have 2\)",
        ),
        ("plain", {"qk_norm": True, "reg_tokens": 3}, r"qk_norm=True \(.* False\), reg_tokens=3 \(.* 0\)"),
        ("plain", {"fc_norm": True, "global_pool": "avg"}, r"fc_norm=True \(the tensors have False\)"),
        ("plain", {"global_pool": "avg"}, r"fc_norm=True by global_pool='avg' \(the tensors have False\)"),
        ("plain", {"qkv_bias": False}, "qkv_bias=False"),
        ("plain", {"class_token": False, "global_pool": "avg", "fc_norm": False}, "class_token=False"),
        ("plain", {"mlp_ratio": 2}, r"mlp_ratio=2 \(the tensors have 4.0\)"),
        ("plain", {"mlp_ratio": "a"}, "mlp_ratio='a'"),
        ("plain", {"init_values": 0.1}, r"init_values=0.1 \(the tensors have None\)"),
        ("plain", {"pos_embed": "none"}, "pos_embed='none'"),
        ("plain", {"patch_size": 16}, r"patch_size=16 \(the tensors have \[8, 8\]\)"),
        ("plain", {"in_chans": 1}, "in_chans=1"),
        ("plain", {"no_embed_class": True}, "no_embed_class=True"),
        ("avg", {"fc_norm": False}, r"fc_norm=False \(the tensors have True\)"),
        ("avg", {"reg_tokens": 0}, r"reg_tokens=0 \(the tensors have 2\)"),
        ("avg", {"no_embed_class": False}, "no_embed_class=False"),
        ("rotary", {"num_reg_tokens": 0}, r"num_reg_tokens=0 \(the tensors have 4\)"),
        ("rotary", {"use_fc_norm": True}, "use_fc_norm=True"),
        ("rotary", {"use_post_transformer_norm": False}, "use_post_transformer_norm=False"),
        ("rotary", {"swiglu_mlp": False}, "swiglu_mlp=False"),
        ("rotary", {"swiglu_align_to": 48}, "mlp_ratio="),
        ("rotary", {"use_abs_pos_emb": True}, "use_abs_pos_emb=True"),
        ("rotary", {"init_values": None}, r"init_values=None \(the tensors have 1e-05\)"),
    ],
)
def test_what_is_said_is_compared_with_the_tensors(
    folders: dict[str, Path], tmp_path: Path, kind: str, arguments: dict[str, Any], named: str
) -> None:
    folder = edited(folders[kind], tmp_path / "a", model_args={"mlp_ratio": 4.0} | arguments)
    with pytest.raises(CheckpointError, match=rf"a/config.json: .*{named}.*; correct config.json, or fetch"):
        read_timm(folder)


def test_what_is_said_otherwise_and_is_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    said: dict[str, Any] = {"patch_size": [8, 8], "mlp_ratio": 4.01, "fc_norm": None, "qkv_bias": 1, "init_values": 0}
    assert read_timm(edited(folders["plain"], tmp_path / "a", model_args=said)).model.config.fc_norm is False


def test_numbers_of_classes(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="num_classes=10: model_args has 5, and must have the same"):
        read_timm(edited(folders["plain"], tmp_path / "a", num_classes=10))
    content = json.loads((folders["plain"] / "config.json").read_text())
    arguments = {key: value for key, value in content["model_args"].items() if key != "num_classes"}
    folder = edited(folders["plain"], tmp_path / "b", num_classes=10)
    (folder / "config.json").write_text(json.dumps(content | {"num_classes": 10, "model_args": arguments}))
    with pytest.raises(CheckpointError, match=r"num_classes=10 \(the tensors have 5\)"):
        read_timm(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": 5}, "architecture=5: must be text"),
        ({"architecture": "resnet50"}, "architecture='resnet50': is none of timm"),
        ({"model_args": [1]}, r"model_args=\[1\]: must be a mapping"),
        ({"model_args": {"img_size": "a"}}, "image_size='a': must be a whole number or a list of 2"),
        ({"model_args": {"img_size": [8, 8, 8]}}, r"image_size=\[8, 8, 8\]: must be a whole number or a list of 2"),
        ({"model_args": {"num_heads": "a"}}, "num_attention_heads='a': must be a whole number"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg='x': must be a mapping"),
        ({"pretrained_cfg": None}, "pretrained_cfg=None: must be a mapping"),
        ({"pretrained_cfg": {"crop_pct": "0.9"}}, "crop_pct='0.9': must be a share"),
        ({"pretrained_cfg": {"crop_pct": 1e-320}}, "crop_pct=1e-320: must be a share"),
        ({"pretrained_cfg": {"crop_pct": 100}}, "size="),
        ({"pretrained_cfg": {"mean": ["a", "b", "c"]}}, r"mean=\['a', 'b', 'c'\]: must be one number, or one"),
        ({"pretrained_cfg": {"mean": {"a": 1}}}, "mean=.*: must be one number, or one"),
        ({"pretrained_cfg": {"std": [0, 0, 0]}}, "image_std=.*: must be above 0"),
        ({"pretrained_cfg": {"input_size": [3, 24]}}, r"input_size=\[3, 24\]: must be channels, height and width"),
        ({"label_names": 5}, "label_names=5: must be a list"),
        ({"label_names": {"a": "b", "c": "d", "e": "f", "g": "h", "i": "j"}}, "id2label="),
    ],
)
def test_a_value_that_is_none_is_named(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"a/config.json: {said}") as error:
        read_timm(edited(folders["plain"], tmp_path / "a", **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [None, "a", -1])
def test_a_base_of_rotations_that_is_none(folders: dict[str, Path], tmp_path: Path, temperature: Any) -> None:
    folder = edited(folders["rotary"], tmp_path / "a", model_args={"rope_temperature": temperature})
    with pytest.raises(CheckpointError, match="rope_theta="):
        read_timm(folder)


def test_a_gate_that_the_architecture_does_not_tell_is_refused(tmp_path: Path) -> None:
    folder = save_theirs(tiny_timm(SWIGLU), tmp_path)
    content = json.loads((folder / "config.json").read_text())
    content["architecture"] = PLAIN
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="are gated, by what the architecture does not say"):
        read_timm(folder)


def test_tensors_without_the_gate_of_the_architecture_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="are not gated, and SwiGLU's are"):
        read_timm(edited(folders["plain"], tmp_path / "a", architecture=SWIGLU))


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
    assert not opened.model.config.has_class_names
    assert "label_names: 3 names for 5 classes are left out" in opened.notes


def test_whose_config_it_is() -> None:
    assert is_timm({"architecture": PLAIN, "pretrained_cfg": {}})
    assert not is_timm({"model_type": "vit", "architectures": ["ViTModel"]})
