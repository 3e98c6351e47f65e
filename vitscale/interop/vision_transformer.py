"""The names of timm's VisionTransformer, which the MAE code shares, and models read from or written by them.

Both keep query, key and value as one matrix, as we do, so that a tensor is another's by its name alone;
only positions differ: timm's may belong to every token in front of the patches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.pretrained import ENCODER, filled, prefix_of, skeleton
from vitscale.interop.strict import refuse, require_equal, shapes
from vitscale.interop.timm_names import timm_name
from vitscale.models.configuration import ViTConfig
from vitscale.models.positions import fixed_positions
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

LAYER_SCALE = 1e-5  # only what a new layer would start from
# Of the tensors that sizes are read from.
_DIMENSIONS = {
    "patch_embed.proj.weight": 4, "pos_embed": 3, "cls_token": 3, "reg_token": 3, "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.mlp.fc2.weight": 2, "head.weight": 2, "decoder_pos_embed": 3, "decoder_blocks.0.mlp.fc1.weight": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A model from somebody's files, every tensor of which is in it."""

    kind: str  # hf (ours too), timm, or checkpoint: a file of weights
    model: ViTPreTrainedModel
    processor: ViTImageProcessor
    tensors: int  # that the files hold
    notes: list[str] = field(default_factory=list)  # what the files do not say, or was said otherwise
    any_size: bool = False  # whether its own library runs it on images of any size, its positions resized


def state_of(model: ViTPreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of a model, fixed positions too, an encoder's under `vit.` whatever the class.

    ConfigError for an encoder alone whose last norm stood in the classifier, which others cannot be without.
    """
    if isinstance(model, ViTModel) and model.config.fc_norm:
        raise ConfigError(
            "fc_norm=True: a ViTModel alone is without its last norm, which stands in the classifier; convert the "
            "ViTForImageClassification, or take --to vitscale"
        )
    prefix = prefix_of(model)
    state = {**model.state_dict(), **fixed_positions(model)}
    return {prefix + name: tensor.detach() for name, tensor in state.items()}


def by_timm_names(model: ViTPreTrainedModel, with_decoder: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """`state_of` a model by timm's names, and our names of what has none; a decoder has some in MAE's code alone."""
    tensors, left_out = {}, []
    for name, tensor in state_of(model).items():
        timm_key = timm_name(name)
        if timm_key is None or (name.startswith("decoder.") and not with_decoder):
            left_out.append(name)
        else:
            tensors[timm_key] = tensor.contiguous()
    return tensors, left_out


def build(
    model_class: type[ViTPreTrainedModel], config: ViTConfig, tensors: Mapping[str, Tensor], where: str
) -> ViTPreTrainedModel:
    """A model of ours from tensors by their names, float32, in evaluation mode.

    tensors: `pos_embed` as ours, class token and patches; those of fixed positions are not there.
    CheckpointError that names what is missing, left over, or of another shape.
    """
    model = skeleton(model_class, config, [name.removeprefix(ENCODER) for name in tensors])
    prefix = prefix_of(model)
    expected = shapes(model.state_dict())
    on_disk = {name: timm_name(prefix + name) or prefix + name for name in expected}
    require_equal({on_disk[name]: shape for name, shape in expected.items()}, shapes(tensors), where)
    return filled(model, {name: tensors[on_disk[name]] for name in expected}, where)


def require(needed: Iterable[str], tensors: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError where one of these is missing, or one that sizes are read from has other dimensions."""
    other = [
        f"{name} {list(tensors[name].shape)} instead of {dimensions} dimensions"
        for name, dimensions in _DIMENSIONS.items()
        if name in tensors and tensors[name].dim() != dimensions
    ]
    refuse(where, missing=[name for name in needed if name not in tensors], other=other)


def depth(tensors: Mapping[str, Tensor], blocks: str) -> int:
    """How many blocks the names tell of."""
    numbers = (re.match(rf"{blocks}\.(\d+)\.", name) for name in tensors)
    return len({match[1] for match in numbers if match})


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keys of ViTConfig that an encoder's tensors by timm's names tell, after `require` has looked at them."""
    width, channels, *patch = tensors["patch_embed.proj.weight"].shape
    intermediate = tensors["blocks.0.mlp.fc2.weight"].shape[1]
    registers = tensors.get("reg_token")
    return {
        "hidden_size": width,
        "num_hidden_layers": depth(tensors, "blocks"),
        "intermediate_size": intermediate,
        "patch_size": (patch[0], patch[1]),
        "encoder_stride": (patch[0], patch[1]),
        "num_channels": channels,
        "num_labels": len(tensors.get("head.weight", ())),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "use_cls_token": "cls_token" in tensors,
        "num_register_tokens": 0 if registers is None else registers.shape[1],
        "layer_scale_init_value": LAYER_SCALE if "blocks.0.ls1.gamma" in tensors else None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "swiglu": tensors["blocks.0.mlp.fc1.weight"].shape[0] == 2 * intermediate,
        "fc_norm": "fc_norm.weight" in tensors,
    }


def fold_positions(tensors: dict[str, Tensor], config: ViTConfig, where: str) -> dict[str, Tensor]:
    """`pos_embed` for class token and patches alone, as ours: registers' positions go into their tokens."""
    tokens = [tensors[name] for name in ("pos_embed", "reg_token") if name in tensors]
    if "pos_embed" not in tensors or any(each.shape[::2] != (1, config.hidden_size) for each in tokens):
        return tensors  # `build` names those of another shape
    positions, patches = tensors["pos_embed"], config.num_patches
    cls, prefix = int(config.use_cls_token), config.num_prefix_tokens
    if positions.shape[1] not in (patches, patches + cls, patches + prefix):
        raise CheckpointError(
            f"{where}: pos_embed has {positions.shape[1]} positions; images of {config.image_size} pixels and patches "
            f"of {config.patch_size} need {patches}, or {patches + prefix} with those of the tokens in front"
        )
    front, of_patches = positions[:, :-patches], positions[:, -patches:]
    missing = positions.new_zeros(1, prefix - front.shape[1], config.hidden_size)  # tokens in front that have none
    front = torch.cat([front, missing], dim=1)
    folded = dict(tensors)
    folded["pos_embed"] = torch.cat([front[:, :cls], of_patches], dim=1)
    if config.num_register_tokens:
        folded["reg_token"] = tensors["reg_token"] + front[:, cls:]
    return folded


def mlp_ratio(hidden: int, width: int) -> float:
    """What timm and MAE make int(width * mlp_ratio) = `hidden` units of."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
