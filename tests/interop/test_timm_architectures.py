"""Every vit_* of timm is known as timm builds it, or refused by name."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest

from vitscale.errors import ConfigError
from vitscale.interop.timm_architectures import EVA, VIT, arguments_of

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
            with pytest.raises(ConfigError, match=rf"'{name}': no ViTConfig can express"):
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
            assert found.get("fc_norm") == said["fc_norm"], name
        else:
            assert found["rope_temperature"] == said["rope_temperature"], name
            assert found["use_fc_norm"] == said["use_fc_norm"], name
            assert found.get("swiglu_align_to", 0) == said["swiglu_align_to"], name
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
        ("vit_relpos_base_patch16_224", {}, "VisionTransformerRelPos"),
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
