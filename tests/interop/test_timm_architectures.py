"""Every vit_* of timm is known as timm builds it, or refused by name."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest

from vitscale.errors import ConfigError
from vitscale.interop.timm_architectures import arguments_of
from vitscale.interop.timm_table import ARCHITECTURES, EVA, VIT

timm = pytest.importorskip("timm")


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


def expressible(kind: str, arguments: dict[str, Any]) -> bool:
    """By the constructor's arguments, whether a ViTConfig has all of it."""
    if kind not in (VIT, EVA) or arguments["global_pool"] not in ("token", "avg", ""):
        return False
    norm = arguments["norm_layer"]
    if norm is not None and getattr(norm, "func", norm) is not timm.layers.LayerNorm:
        return False
    if kind == VIT:
        plain = {
            key: arguments[key] for key in ("pre_norm", "scale_attn_norm", "scale_mlp_norm", "pool_include_prefix")
        }
        known = (
            arguments["block_fn"] is timm.models.vision_transformer.Block
            and arguments["final_norm"]
            and arguments["proj_bias"]
        )
        parts = arguments["embed_layer"] is timm.layers.PatchEmbed and arguments["attn_layer"] is timm.layers.Attention
        mlp = arguments["mlp_layer"] in (timm.layers.Mlp, timm.layers.SwiGLUPacked)
        return known and parts and mlp and not any(plain.values()) and arguments["act_layer"] != "quick_gelu"
    rotary = arguments["use_rot_pos_emb"] and arguments["rope_type"] == "dinov3" and arguments["rope_rotate_half"]
    plain = {"use_pre_transformer_norm", "use_post_norm", "scale_mlp", "scale_attn_inner", "attn_only_layer_scale"}
    usual = arguments["qkv_fused"] and arguments["num_kv_heads"] is None and arguments["rope_grid_indexing"] == "ij"
    return rotary and usual and not any(arguments[key] for key in plain)


def test_every_vit_of_timm_is_known_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [timm.list_models(module=module) for module in ("vision_transformer", "eva", "deit")]
    names = sorted({*timm.list_models("vit_*"), *(name for each in modules for name in each)})
    assert len(names) > 240
    assert ARCHITECTURES.keys() <= set(names)
    read = []
    for name in names:
        kind, arguments = constructor_arguments(name, monkeypatch)
        if not expressible(kind, arguments):
            reason = "no ViTConfig can express" if name in ARCHITECTURES else "is none of"
            with pytest.raises(ConfigError, match=rf"'{name}': {reason}"):
                arguments_of(name, {})
            continue
        found = arguments_of(name, {})
        read.append(name)
        assert (found["class"], found["num_heads"], found["global_pool"]) == (
            kind, arguments["num_heads"], arguments["global_pool"]
        ), name  # fmt: skip
        assert found["eps"] == getattr(arguments["norm_layer"], "keywords", {}).get("eps", 1e-6), name
        if kind == VIT:
            gated = arguments["mlp_layer"] is timm.layers.SwiGLUPacked
            assert (found.get("mlp_layer") == "SwiGLUPacked") == gated, name
            assert gated or found["act_layer"] == (arguments["act_layer"] or "gelu"), name
            assert found.get("fc_norm") == arguments["fc_norm"], name
        else:
            assert found["rope_temperature"] == arguments["rope_temperature"], name
            assert found["use_fc_norm"] == arguments["use_fc_norm"], name
            assert found.get("swiglu_align_to", 0) == arguments["swiglu_align_to"], name
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
        ("vit_base_patch16_224", {"eps": 0.1}, "eps=0.1"),
        ("vit_base_patch16_224", {"class": "Eva"}, "class='Eva'"),
        ("vit_relpos_base_patch16_224", {}, "is none of timm"),
        ("deit_tiny_distilled_patch16_224", {}, "a distillation token"),
        ("resnet50", {}, "is none of timm"),
        ("vit_base_patch16_of_tomorrow_224", {}, "is none of timm"),
    ],
)
def test_a_refusal_names_architecture_and_reason(architecture: str, model_args: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        arguments_of(architecture, model_args)
    assert architecture in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
