"""What timm's architectures are made of where the tensors do not tell, and which a ViTConfig can express.

timm writes an architecture's name and the arguments that differ from it; the rest stands in its code,
and here in timm_table.py. An argument that no ViTConfig
key stands for is what a model is refused by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.errors import ConfigError
from vitscale.files.model_folder import CONFIG
from vitscale.interop.timm_table import ARCHITECTURES, EVA, VIT
from vitscale.models.configuration import ViTConfig

_DEFAULTS: dict[str, dict[str, Any]] = {
    VIT: {"num_heads": 12, "global_pool": "token", "eps": 1e-6, "act_layer": "gelu"},
    EVA: {
        "num_heads": 12, "global_pool": "avg", "eps": 1e-6, "act_layer": "gelu",
        "use_rot_pos_emb": False, "rope_type": "cat", "rope_rotate_half": False, "rope_temperature": 10000.0,
    },
}  # fmt: skip
# Arguments of which only these values have a ViTConfig, and what the others ask for.
_NORM = "norms that are no layer norms, or of another eps than the architecture's"
_RULES: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    VIT: {
        "global_pool": (("token", "avg", ""), "a pooling that is neither the class token nor the mean"),
        "distilled": ((False,), "a distillation token"),
        "pool_include_prefix": ((False,), "a mean over class token and registers too"),
        "pre_norm": ((False,), "a norm before the blocks"),
        "final_norm": ((True,), "no norm after the blocks"),
        "act_layer": (("gelu", "gelu_tanh", "relu", "silu", "swish", "tanh"), "another activation"),
        "attn_layer": (("", "default"), "another attention"),
        "mlp_layer": (("SwiGLUPacked",), "another MLP"),
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
# Arguments that the tensors tell too, of both classes and of one.
_TOLD = ("embed_dim", "depth", "in_chans", "num_classes", "qkv_bias", "qk_norm", "class_token", "no_embed_class",
         "patch_size", "mlp_ratio", "init_values")  # fmt: skip
_TOLD_OF = {
    VIT: (*_TOLD, "reg_tokens", "fc_norm", "pos_embed"),
    EVA: (*_TOLD, "num_reg_tokens", "use_fc_norm", "use_abs_pos_emb", "swiglu_mlp", "use_post_transformer_norm"),
}
# Arguments that timm.py reads, or that a trained model does not feel.
_UNFELT = {"img_size", "num_heads", "dynamic_img_size", "drop_rate", "pos_drop_rate", "patch_drop_rate",
           "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}  # fmt: skip
_UNFELT_OF = {
    VIT: _UNFELT | {"weight_init", "fix_init"},
    EVA: _UNFELT | {
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
    table = ARCHITECTURES.get(architecture)
    if table is None:
        raise ConfigError(f"architecture={architecture!r}: is none of timm 1.0's ViTs that a ViTConfig can express")
    kind = table["class"]
    arguments, rules = {**_DEFAULTS[kind], **(under or {}), **table, **model_args}, _RULES[kind]
    reasons = [
        f"{name}={arguments[name]!r} ({reason})"
        for name, (allowed, reason) in rules.items()
        if name in arguments and arguments[name] not in allowed
    ]
    unknown = sorted(model_args.keys() - rules.keys() - {*_TOLD_OF[kind]} - _UNFELT_OF[kind])
    reasons += [f"{name}={model_args[name]!r} (an argument that is not known here)" for name in unknown]
    if reasons:
        raise ConfigError(f"architecture={architecture!r}: no ViTConfig can express {'; '.join(reasons)}")
    return arguments


def require_consistent(
    declared: dict[str, Any], actual: dict[str, Any], config: ViTConfig, tensors: Mapping[str, Tensor]
) -> None:
    """A folder that contradicts itself: ConfigError names each argument whose value the tensors are not of.

    timm builds a model of what is declared and then finds no place for the tensors; here it is the other way round.

    declared: arguments_of; actual: the arguments that make timm's model of `config`, which is read from the tensors.
    """
    norm, pooling = "use_fc_norm" if declared["class"] == EVA else "fc_norm", declared["global_pool"]
    follows = {norm: pooling == "avg", "use_post_transformer_norm": not config.fc_norm}
    by = {norm: f" by global_pool={pooling!r}"} if declared.get(norm) is None else {}
    declared = declared | {name: value for name, value in follows.items() if declared.get(name) is None}
    actual = actual | {
        "in_chans": config.num_channels,
        "num_classes": config.num_labels,
        "use_post_transformer_norm": not config.fc_norm,
        "no_embed_class": declared.get("no_embed_class"),
    }
    if "pos_embed" in tensors and config.num_prefix_tokens:
        actual["no_embed_class"] = tensors["pos_embed"].shape[1] == config.num_patches
    wrong = [
        f"{name}={declared[name]!r}{by.get(name, '')} (the tensors have {actual[name]!r})"
        for name in _TOLD_OF[declared["class"]]
        if name in declared and name in actual and _meaning(name, declared, config) != _meaning(name, actual, config)
    ]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}; correct {CONFIG}, or fetch the folder again")


def _meaning(name: str, arguments: dict[str, Any], config: ViTConfig) -> Any:
    """An argument's value as the tensors would show it; what is no value of it equals nothing."""
    value = arguments[name]
    try:
        if name == "patch_size":
            return pair(value if isinstance(value, int) else tuple(value))
        if name == "mlp_ratio":
            hidden = int(config.hidden_size * float(value))
            return hidden + -hidden % (arguments.get("swiglu_align_to") or 1)
    except (TypeError, ValueError, OverflowError):
        return None
    if name == "init_values":
        return value is not None if config.rope_theta is not None else bool(value)
    if name == "pos_embed":
        return value not in ("", "none")
    return value
