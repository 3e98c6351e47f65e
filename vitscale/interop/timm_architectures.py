"""What timm's architectures are made of where the tensors do not tell, and which a ViTConfig can express.

timm writes an architecture's name and the arguments that differ from it; the rest stands in its code.
The rules below give that rest for every vit_* of timm 1.0, without timm. An argument that no ViTConfig
key stands for is what a model is refused by.
"""

from __future__ import annotations

import re
from typing import Any

from vitscale.errors import ConfigError

VIT, EVA = "VisionTransformer", "Eva"  # timm's classes
_DEFAULTS: dict[str, dict[str, Any]] = {
    VIT: {"num_heads": 12, "global_pool": "token", "eps": 1e-6, "act_layer": "gelu"},
    EVA: {
        "num_heads": 12, "global_pool": "avg", "eps": 1e-6, "act_layer": "gelu",
        "use_rot_pos_emb": False, "rope_type": "cat", "rope_rotate_half": False, "rope_temperature": 10000.0,
    },
}  # fmt: skip
# The word before _patch tells the heads, but for those named below.
_HEADS = {
    "tiny": 3, "xsmall": 4, "wee": 4, "pwee": 4, "dwee": 4, "dpwee": 4, "little": 5, "dlittle": 5, "small": 6,
    "small_plus": 6, "medium": 8, "mediumd": 8, "betwixt": 10, "base": 12, "so150m2": 13, "so150m": 14, "large": 16,
    "intern300m": 16, "so400m": 16, "huge": 16, "giant": 16, "giantopt": 16, "gigantic": 16, "huge_plus": 20,
    "7b": 32, "5b": 32,
}  # fmt: skip
_DINOV3 = {
    "class": EVA, "eps": 1e-5, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_temperature": 100.0,
    "rope_rotate_half": True, "use_fc_norm": False,
}  # fmt: skip
_ROPE = {"class": EVA, "use_rot_pos_emb": True}
_TANH = {"act_layer": "gelu_tanh"}
# Patterns of whole names -> arguments. Every one that matches is laid over those above it; a name that
# none matches is not known.
_FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"vit_\w+_patch\d+_(\d+|224_miil|36x1_224)", {}),
    (r"vit_base_patch\d+_plus_\d+", {"num_heads": 14}),
    (r"vit_\w+_patch14_(reg\d_)?(dinov2|tipsv2)", {}),
    (r"vit_giant_patch14_(reg\d_)?(dinov2|tipsv2)", {"num_heads": 24, "mlp_layer": "SwiGLUPacked"}),
    (r"vit_\w+_patch\d+_(reg\d_|siglip_)?gap_\d+", {"global_pool": "avg"}),
    (r"vit_\w+_patch\d+_(siglip_)?gap_\d+|vit_so150m_patch16_reg4_gap_\d+", {"fc_norm": False}),
    (r"vit_base_patch16_gap_224", {"num_heads": 16}),
    (r"vit_\w+_patch16_dinov3(_qkvb)?", _DINOV3),
    (r"vit_\w+_patch16_lingbot", _DINOV3 | {"global_pool": "token"}),
    (r"vit_giant_patch16_lingbot", {"num_heads": 24}),
    (r"vit_\w+_plus_patch16_dinov3(_qkvb)?|vit_giant_patch16_lingbot", {"swiglu_align_to": 8}),
    (r"vit_7b_patch16_dinov3", {"swiglu_align_to": 64}),
    # What no ViTConfig expresses:
    (r"vit_\w+_patch\d+_(siglip_\d+|reg\d_map_\d+)", {"global_pool": "map"}),
    (r"vit_(base_patch32|giantopt_patch16|so400m_patch16)_siglip_\w+", _TANH),
    (r"vit_large_patch16_siglip_(gap_)?512", _TANH),
    (r"vit_\w+_patch\d+_clip_\w+", {"eps": 1e-5, "pre_norm": True}),
    (r"vit_base_patch16_plus_clip_240", {"eps": 1e-5, "pre_norm": True, "num_heads": 14}),
    (r"vit_\w+_clip_quickgelu_\d+", {"act_layer": "quick_gelu"}),
    (r"vit_\w+_18x2_\d+", {"block_fn": "ParallelThingsBlock"}),
    (r"vit_\w+_rpn_\d+", {"block_fn": "ResPostBlock"}),
    (r"vit_\w+_patch\d+_xp_\d+", {"block_fn": "ParallelScalingBlock", "norm_layer": "RmsNorm", "pre_norm": True}),
    (r"vit_pwee_\w+", {"block_fn": "ParallelScalingBlock"}),
    (r"vit_dpwee_\w+", {"block_fn": "DiffParallelScalingBlock"}),
    (r"vit_(dwee|dlittle)_\w+", {"attn_layer": "diff"}),
    (r"vit_\w+_patch16_radio_v\d|vit_intern300m_\w+", {"final_norm": False}),
    (r"vit_giant_patch16_(radio_v\d|sapiens2)", {"num_heads": 24}),
    (r"vit_\w+_patch16_rope_(ape_)?\d+", _ROPE | {"global_pool": "token", "rope_grid_indexing": "xy"}),
    (r"vit_\w+_rope_mixed_(ape_)?\d+", _ROPE | {"global_pool": "token", "rope_type": "mixed"}),
    (r"vit_\w+_rope_reg\d_gap_\d+", _ROPE),
    (r"vit_\w+_patch16_sapiens2", {**_DINOV3, "num_kv_heads": "by layer", "norm_layer": "RmsNorm", "eps": 1e-6}),
    (r"vit_s?relpos_\w+", {"class": "VisionTransformerRelPos"}),
    (r"vit_pe_\w+", _ROPE | {"use_pre_transformer_norm": True}),
    (r"vit_(\w+_)?(mci|r\d+_s\d+|resnet\d+d(_s\d+)?|r_s16_p8)_\d+", {"embed_layer": "HybridEmbed"}),
)

# Arguments of which only these values have a ViTConfig, and what the others ask for.
_NORM = "norms that are no layer norms, or of another eps than the architecture's"
_RULES: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    VIT: {
        "global_pool": (("token", "avg", ""), "a pooling that is neither the class token nor the mean"),
        "pool_include_prefix": ((False,), "a mean over class token and registers too"),
        "pre_norm": ((False,), "a norm before the blocks"),
        "final_norm": ((True,), "no norm after the blocks"),
        "act_layer": (("gelu", "gelu_tanh", "relu", "silu", "swish", "tanh"), "another activation"),
        "block_fn": ((), "other blocks than attention, then MLP"),
        "attn_layer": (("", "default"), "another attention"),
        "mlp_layer": (("SwiGLUPacked",), "another MLP"),
        "embed_layer": ((), "a stem that is no single convolution"),
        "norm_layer": ((None,), _NORM),
        "embed_norm_layer": ((None,), "a norm of the patches"),
        "scale_attn_norm": ((False,), "a norm within the attention"),
        "scale_mlp_norm": ((False,), "a norm within the MLP"),
        "proj_bias": ((True,), "projections without bias"),
        "dynamic_img_pad": ((False,), "padded images"),
    },
    EVA: {
        "global_pool": (("token", "avg", ""), "a pooling that is neither the class token nor the mean"),
        "use_rot_pos_emb": ((True,), "Eva's blocks without rotary positions"),
        "act_layer": (("gelu",), "another activation"),
        "rope_type": (("dinov3",), "rotary positions of another kind than DINOv3's"),
        "rope_rotate_half": ((True,), "rotary positions that turn neighbours"),
        "rope_grid_indexing": (("ij",), "rotary positions by column first"),
        "rope_grid_offset": ((0, 0.0), "a shifted grid"),
        "rope_mrope_section": ((None,), "rotary positions of another kind than DINOv3's"),
        "attn_type": (("eva", "rope"), "another attention"),
        "num_kv_heads": ((None,), "grouped queries"),
        "qkv_fused": ((True,), "query, key and value apart"),
        "use_pre_transformer_norm": ((False,), "a norm before the blocks"),
        "use_post_norm": ((False,), "norms after the branches"),
        "norm_layer": ((None,), _NORM),
        "scale_mlp": ((False,), "a norm within the MLP"),
        "scale_attn_inner": ((False,), "a norm within the attention"),
        "attn_only_layer_scale": ((False,), "a layer scale of the attention alone"),
        "dynamic_img_pad": ((False,), "padded images"),
    },
}
# Arguments that the tensors tell too (timm_said.py), that timm.py reads, or that a trained model does not feel.
_TOLD = {
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
    "qk_norm", "init_values", "class_token", "no_embed_class", "dynamic_img_size", "drop_rate", "pos_drop_rate",
    "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
}  # fmt: skip
_KNOWN = {
    VIT: _TOLD | {"reg_tokens", "fc_norm", "pos_embed", "weight_init", "fix_init"},
    EVA: _TOLD | {
        "num_reg_tokens", "use_fc_norm", "use_post_transformer_norm", "use_abs_pos_emb", "swiglu_mlp",
        "swiglu_align_to", "rope_temperature", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords",
        "ref_feat_shape", "attn_pool_num_heads", "attn_pool_mlp_ratio", "head_init_scale",
    },
}  # fmt: skip


def arguments_of(architecture: str, model_args: dict[str, Any], under: dict[str, Any] | None = None) -> dict[str, Any]:
    """What timm would build `architecture` with, as far as tensors do not tell; `class` and `eps` are ours.

    model_args: what config.json has under that key, laid over the architecture's own; under: what those
    lie over. ConfigError for a name that is not known here and for arguments that no ViTConfig can
    express, each with its reason.
    """
    found = [arguments for pattern, arguments in _FAMILIES if re.fullmatch(pattern, architecture)]
    if not found:
        raise ConfigError(
            f"architecture={architecture!r}: is none of timm 1.0's vit_{{tiny,small,base,large,huge,...}}_patch*"
        )
    merged: dict[str, Any] = {"class": VIT}
    size = re.match(r"vit_(\w+?)_patch", architecture)
    if size and size[1] in _HEADS:
        merged["num_heads"] = _HEADS[size[1]]
    for arguments in found:
        merged |= arguments
    kind = merged["class"]
    merged = {**_DEFAULTS.get(kind, {}), **(under or {}), **merged, **model_args}
    reasons = _refused(kind, merged, model_args)
    if reasons:
        raise ConfigError(f"architecture={architecture!r}: no ViTConfig can express {'; '.join(reasons)}")
    return merged


def _refused(kind: str, arguments: dict[str, Any], model_args: dict[str, Any]) -> list[str]:
    if kind not in _RULES:
        return [f"its class {kind}"]
    rules = _RULES[kind]
    reasons = [
        f"{name}={arguments[name]!r} ({reason})"
        for name, (allowed, reason) in rules.items()
        if name in arguments and arguments[name] not in allowed
    ]
    unknown = sorted(model_args.keys() - rules.keys() - _KNOWN[kind])
    return reasons + [f"{name}={model_args[name]!r} (an argument that is not known here)" for name in unknown]
