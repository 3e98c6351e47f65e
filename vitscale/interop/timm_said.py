"""What a timm folder says that its tensors tell too: a folder that contradicts itself is refused by name.

timm builds a model of what is said and then finds no place for the tensors; here it is the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.errors import ConfigError
from vitscale.interop.sources import CONFIG
from vitscale.interop.timm_architectures import EVA
from vitscale.models.configuration import ViTConfig

_PLAIN = ("embed_dim", "depth", "in_chans", "num_classes", "qkv_bias", "qk_norm", "class_token", "no_embed_class")
_BY_CLASS = ("reg_tokens", "fc_norm", "num_reg_tokens", "use_fc_norm", "use_abs_pos_emb", "swiglu_mlp")
_COMPARED = (*_PLAIN, *_BY_CLASS, "patch_size", "mlp_ratio", "init_values", "pos_embed", "use_post_transformer_norm")


def require_said(said: dict[str, Any], has: dict[str, Any], config: ViTConfig, tensors: Mapping[str, Tensor]) -> None:
    """ConfigError that names each argument whose value the tensors are not of.

    said: arguments_of; has: the arguments that make timm's model of `config`, which is read from the tensors.
    """
    norm, pooling = "use_fc_norm" if said["class"] == EVA else "fc_norm", said["global_pool"]
    follows = {norm: pooling == "avg", "use_post_transformer_norm": not config.fc_norm}
    by = {norm: f" by global_pool={pooling!r}"} if said.get(norm) is None else {}
    said = said | {name: value for name, value in follows.items() if said.get(name) is None}
    has = has | {
        "in_chans": config.num_channels,
        "num_classes": config.num_labels,
        "use_post_transformer_norm": not config.fc_norm,
        "no_embed_class": said.get("no_embed_class"),
    }
    if "pos_embed" in tensors and config.num_prefix_tokens:
        has["no_embed_class"] = tensors["pos_embed"].shape[1] == config.num_patches
    wrong = [
        f"{name}={said[name]!r}{by.get(name, '')} (the tensors have {has[name]!r})"
        for name in _COMPARED
        if name in said and name in has and _meaning(name, said, config) != _meaning(name, has, config)
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
