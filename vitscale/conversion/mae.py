"""A model as a .pth of facebookresearch/mae, under the names of its models_mae.py or models_vit.py."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.bare import EPS, KEYS, WRITTEN
from vitscale.interop.vision_transformer import Opened, by_timm_names
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.text import first_sentence

# Config key -> the values that MAE's code has.
_MAE_HAS: dict[str, tuple[Any, ...]] = {
    "use_cls_token": (True,), "num_register_tokens": (0,), "rope_theta": (None,), "layer_scale_init_value": (None,),
    "qk_norm": (False,), "swiglu": (False,), "qkv_bias": (True,), "hidden_act": ("gelu", "gelu_python"),
    "position_embeddings": ("sincos", "learned"),
}  # fmt: skip


def write_mae(path: Path, opened: Opened) -> tuple[list[str], list[str]]:
    """Write a .pth that models_mae.py (from a ViTMAEForPreTraining) or models_vit.py loads, under 'model'.

    Beside it plain numbers and texts say what such a file leaves open. Gives the names of our tensors that
    MAE has no place for, and notes. ConfigError that names what MAE's code cannot express.
    """
    config = opened.model.config
    _require_expressible(opened.model)
    tensors, left_out = by_timm_names(opened.model, with_decoder=isinstance(opened.model, ViTMAEForPreTraining))
    written = {name: value for name, value in asdict(config).items() if name in (*KEYS, "mask_ratio", "id2label")}
    written["processor"] = opened.processor.to_dict()
    try:
        torch.save({"model": tensors, WRITTEN: written}, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written: {first_sentence(str(error))}") from None
    eps = config.layer_norm_eps
    return left_out, [] if eps == EPS else [f"layer_norm_eps={eps} became {EPS}: MAE's code has no other"]


def _require_expressible(model: ViTPreTrainedModel) -> None:
    config = model.config
    wrong = [
        f"{key}={getattr(config, key)!r}" for key, values in _MAE_HAS.items() if getattr(config, key) not in values
    ]
    if config.attention_width != config.hidden_size:
        wrong.append(f"head_dim={config.head_dim} (its heads share out the width)")
    sides = {"image_size": config.image_size, "patch_size": config.patch_size}
    wrong += [f"{key}={size} (no square)" for key, size in sides.items() if isinstance(size, tuple)]
    if isinstance(model, ViTForImageClassification) and (config.pooling == "mean") != config.fc_norm:
        wrong.append(f"pooling={config.pooling!r} with fc_norm={config.fc_norm} (it has mean with, or cls without)")
    if isinstance(config, ViTMAEConfig):
        if config.num_channels != 3:
            wrong.append(f"num_channels={config.num_channels} (it cuts patches of 3)")
        ratios = (config.intermediate_size / config.hidden_size,
                  config.decoder_intermediate_size / config.decoder_hidden_size)  # fmt: skip
        if ratios[0] != ratios[1]:
            wrong.append(f"intermediate_size and decoder_intermediate_size of {ratios} widths (it has one mlp_ratio)")
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: MAE's code cannot express it; take --to vitscale, hf or timm")
