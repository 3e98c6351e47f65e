"""config.json of transformers' other Vision Transformers (DINOv2, DINOv3, MSN, I-JEPA), as ViTConfig has it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vitscale.config.typed import is_finite, type_name
from vitscale.models.configuration import ViTConfig, refuse

# Keys that mean the same to each of their classes and to ViTConfig.
_SAME = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "initializer_range", "image_size",
    "patch_size", "num_channels", "num_labels", "id2label", "label2id", "problem_type", "output_attentions",
    "output_hidden_states", "head_dim",
}  # fmt: skip
# Keys that change no output in evaluation: of backbones, of a mask token, of augmented rotary positions.
_SILENT = {
    "apply_layernorm", "reshape_hidden_states", "return_class_token", "out_features", "out_indices", "stage_names",
    "use_mask_token", "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale",
}  # fmt: skip
_RENAMED = {
    "layerscale_value": "layer_scale_init_value", "use_swiglu_ffn": "swiglu", "use_gated_mlp": "swiglu",
    "attention_dropout": "attention_probs_dropout_prob",
}  # fmt: skip
_VIT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "qkv_bias": True}
_DINOV2: dict[str, Any] = {
    **_VIT, "layer_norm_eps": 1e-6, "patch_size": 14, "mlp_ratio": 4.0, "layerscale_value": 1.0,
    "drop_path_rate": 0.0, "use_swiglu_ffn": False,
}  # fmt: skip
# By model_type: the keys of its own, with its defaults.
THEIRS: dict[str, dict[str, Any]] = {
    "dinov2": _DINOV2,
    "dinov2_with_registers": {**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
    "dinov3_vit": {
        "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "layer_norm_eps": 1e-5,
        "rope_theta": 100.0, "layerscale_value": 1.0, "drop_path_rate": 0.0, "num_register_tokens": 0,
        "attention_dropout": 0.0, "hidden_act": "gelu", "use_gated_mlp": False, "query_bias": True, "key_bias": False,
        "value_bias": True, "proj_bias": True, "mlp_bias": True,
    },
    "vit_msn": {**_VIT, "layer_norm_eps": 1e-6, "intermediate_size": 3072},
    "ijepa": {**_VIT, "layer_norm_eps": 1e-12, "intermediate_size": 3072},
}  # fmt: skip
# What a class always does.
_FIXED: dict[str, dict[str, Any]] = {
    "dinov3_vit": {"position_embeddings": "none"},
    "ijepa": {"use_cls_token": False, "pooling": "mean"},
}

# Of these, the ones that resize positions to whatever image they are given; and the one that filters them as it does.
ANY_SIZE, ANTIALIASED = ("dinov2", "dinov2_with_registers", "dinov3_vit"), "dinov2_with_registers"


def translated(content: dict[str, Any]) -> dict[str, Any]:
    """The content of their config.json by the keys of ViTConfig; keys that are not known here stay.

    content: of a `model_type` in THEIRS. ConfigError for a value that no ViTConfig can express.
    """
    kind = content["model_type"]
    known = _SAME | THEIRS[kind].keys()
    values = THEIRS[kind] | {name: content[name] for name in known & content.keys() if content[name] is not None}
    for name, usual in THEIRS[kind].items():
        wrong = isinstance(usual, float) and not is_finite(values[name])
        if wrong or isinstance(usual, bool) != isinstance(values[name], bool):
            refuse(name, values[name], type_name(type(usual)))
    if "use_gated_mlp" in values:
        _settle_dinov3(values)
    if "mlp_ratio" in values:
        _settle_intermediate(values)
    unknown = content.keys() - known - _SILENT - {item.name for item in fields(ViTConfig)} - {"model_type"}
    keys = {_RENAMED.get(name, name): value for name, value in values.items()}
    return {name: content[name] for name in unknown} | keys | _FIXED.get(kind, {})


def _settle_dinov3(values: dict[str, Any]) -> None:
    biases = [values.pop(name) for name in ("query_bias", "key_bias", "value_bias")]
    values["qkv_bias"] = any(biases)
    for name in ("proj_bias", "mlp_bias"):
        if not values.pop(name):
            refuse(name, False, "true, since every ViT here has these biases")
    if values["use_gated_mlp"] and values["hidden_act"] not in ("silu", "swish"):
        refuse("hidden_act", values["hidden_act"], "silu where use_gated_mlp=true, as SwiGLU has it")


def _settle_intermediate(values: dict[str, Any]) -> None:
    """DINOv2's mlp_ratio as a width: of a gated MLP two thirds, in eights."""
    ratio, width = values.pop("mlp_ratio"), values.get("hidden_size", ViTConfig.hidden_size)
    if ratio <= 0:
        refuse("mlp_ratio", ratio, "above 0")
    if type(width) is int and is_finite(width) and is_finite(width * ratio):  # ViTConfig refuses another
        inner = int(width * ratio)
        values["intermediate_size"] = (int(inner * 2 / 3) + 7) // 8 * 8 if values["use_swiglu_ffn"] else inner
