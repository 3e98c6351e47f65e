"""Models of timm: a folder of its config.json and weights as our module, and the way back.

What a folder says is its tensors, its architecture's name (timm_architectures.py), the arguments that
differ from it (`model_args`) and `pretrained_cfg`. timm itself is not needed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.errors import CheckpointError, ConfigError
from vitscale.files.model_folder import CONFIG, read_json
from vitscale.interop.checkpoints import TIMM_ANCHOR, unwrap
from vitscale.interop.dialects import plain_names
from vitscale.interop.timm_architectures import arguments_of, require_consistent
from vitscale.interop.timm_inputs import processor_of
from vitscale.interop.timm_table import ARCHITECTURES, EVA, VIT
from vitscale.interop.vision_transformer import LAYER_SCALE, Opened, build, fold_positions, mlp_ratio, require, sizes
from vitscale.interop.weight_files import read_weights
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
    "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip
_FROM_TIMM = {"gelu_tanh": "gelu_pytorch_tanh"}
_POOLING = {"token": "cls", "avg": "mean"}

# What a folder of ours says it is: by its width and patch, where timm has that, so that it reads as what it is;
# model_args tell the rest. Where timm has an argument only in an architecture's code, an architecture that has it.
_BY_WIDTH = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_PLAIN, _SWIGLU = "vit_base_patch16_224", "vit_giant_patch14_dinov2"
_PLAIN_EPS5 = "vit_base_patch16_clip_224"
_ROTARY, _ROTARY_EPS5 = "vit_base_patch16_rope_224", "vit_base_patch16_dinov3"


def is_timm(content: dict[str, Any]) -> bool:
    """Whether a config.json is timm's."""
    return "architecture" in content and "model_type" not in content


def read_timm(folder: Path, take: str | None = None) -> Opened:
    """The model of a timm folder (what timm.create_model("local-dir:FOLDER") opens), strictly.

    A ViTForImageClassification, without a classifier where timm has none, or a ViTModel where it does not
    pool. CheckpointError that names the architecture and why no ViTConfig can express it, the tensors, or
    what config.json says and they do not have.
    """
    content = read_json(folder / CONFIG)
    try:
        return _opened(folder, content, take)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def _opened(folder: Path, content: dict[str, Any], take: str | None) -> Opened:
    """ConfigError for what config.json says."""
    inputs, arguments = _declared(content)
    where = f"{folder} ({content['architecture']})"
    checkpoint = unwrap(read_weights(folder), str(folder), take)
    tensors, conversions = plain_names({name: tensor.float() for name, tensor in checkpoint.tensors.items()})
    pools = arguments["global_pool"] != ""
    model_class: type[ViTPreTrainedModel] = ViTForImageClassification if pools else ViTModel
    config, notes = _config(arguments, inputs, content, tensors, where)
    require_consistent(arguments, arguments_for(config)[1], config, tensors)
    tensors = fold_positions(tensors, config, where)
    processor, more = processor_of(inputs, config)
    notes = [*checkpoint.notes, *conversions, *notes, *more]
    return Opened("timm", build(model_class, config, tensors, where), processor, len(checkpoint.tensors), notes)


def _declared(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """pretrained_cfg, and the arguments of the model."""
    architecture, model_args = content["architecture"], content.get("model_args") or {}
    inputs = {key: value for key, value in content.items() if key not in ("architecture", "num_features")}
    inputs = content.get("pretrained_cfg", inputs)  # before 2023 all lay side by side
    for key, value, kind in (
        ("architecture", architecture, str), ("model_args", model_args, dict), ("pretrained_cfg", inputs, dict)
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise ConfigError(f"{key}={value!r}: must be {'text' if kind is str else 'a mapping'}")
    size = inputs.get("input_size") or (3, 224, 224)
    if not isinstance(size, list | tuple) or len(size) != 3:
        raise ConfigError(f"input_size={size!r}: must be channels, height and width")
    classes = content.get("num_classes", inputs.get("num_classes"))
    under = {"in_chans": size[0], **({} if classes is None else {"num_classes": classes})}
    arguments = arguments_of(architecture, model_args, under)
    if classes is not None and classes != arguments["num_classes"]:
        raise ConfigError(
            f"num_classes={classes!r}: model_args has {arguments['num_classes']!r}, and must have the same"
        )
    return inputs, arguments | {"img_size": arguments.get("img_size") or tuple(size[1:])}


def _config(
    arguments: dict[str, Any], inputs: dict[str, Any], content: dict[str, Any], tensors: dict[str, Tensor], where: str
) -> tuple[ViTConfig, list[str]]:
    """What the tensors, the arguments and pretrained_cfg say together."""
    require((TIMM_ANCHOR, "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"), tensors, where)
    keys = sizes(tensors)
    gated = keys["swiglu"]
    if arguments["class"] == VIT and gated != (arguments.get("mlp_layer") == "SwiGLUPacked"):
        is_not = "gated, by what the architecture does not say" if gated else "not gated, and SwiGLU's are"
        raise CheckpointError(f"{where}: its MLPs are {is_not}; name an architecture of the same MLPs")
    names, notes = _labels(content, inputs, keys["num_labels"])
    scale = keys["layer_scale_init_value"] and (arguments.get("init_values") or LAYER_SCALE)
    # A base of 0 is refused by ViTConfig; None would be no rotation.
    theta = (arguments["rope_temperature"] or 0.0) if arguments["class"] == EVA else None
    keys |= {
        "num_attention_heads": arguments["num_heads"],
        "hidden_act": _FROM_TIMM.get(arguments["act_layer"], arguments["act_layer"]),
        "layer_norm_eps": arguments["eps"],
        "image_size": arguments["img_size"],
        "id2label": names,
        "position_embeddings": "learned" if "pos_embed" in tensors else "none",
        "rope_theta": theta,
        "layer_scale_init_value": scale,
        "pooling": _POOLING.get(arguments["global_pool"], "cls" if keys["use_cls_token"] else "mean"),
    }
    return ViTConfig(**keys), notes


def _labels(content: dict[str, Any], inputs: dict[str, Any], classes: int) -> tuple[dict[int, str] | None, list[str]]:
    """The classes' names, where there are as many as the head has rows."""
    names = content.get("label_names") or inputs.get("label_names") or inputs.get("labels")
    if not names or not classes:
        return None, []
    if not isinstance(names, list | dict):
        raise ConfigError(f"label_names={names!r}: must be a list of names")
    named = names if isinstance(names, dict) else dict(enumerate(names))
    if len(named) != classes:
        return None, [f"label_names: {len(named)} names for {classes} classes are left out"]
    return {number: str(name) for number, name in named.items()}, []


def arguments_for(config: ViTConfig) -> tuple[str, dict[str, Any], list[str]]:
    """An architecture's name, every argument that makes it this config, and what stays different."""
    rotary = config.rope_theta is not None
    if config.attention_width != config.hidden_size:
        raise ConfigError(
            f"head_dim={config.head_dim} with num_attention_heads={config.num_attention_heads}: timm's heads share out "
            f"hidden_size={config.hidden_size}; take --to hf"
        )
    architecture, eps = _architecture(config)
    halves = 2 if config.swiglu and not rotary else 1  # VisionTransformer's SwiGLU counts both
    arguments: dict[str, Any] = {
        "img_size": list(pair(config.image_size)),
        "patch_size": list(pair(config.patch_size)),
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio(halves * config.intermediate_size, config.hidden_size),
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "class_token": config.use_cls_token,
        "no_embed_class": False,
        "global_pool": "avg" if config.pooling == "mean" else "token",
    }
    scale = config.layer_scale_init_value
    arguments["init_values"] = None if scale is None else scale or LAYER_SCALE  # 0 would mean none
    if rotary:
        if config.hidden_act != "gelu" and not config.swiglu:
            raise ConfigError(f"hidden_act={config.hidden_act!r}: timm's models with rotary positions have gelu alone")
        arguments |= {
            "attn_type": "rope", "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True,
            "rope_grid_indexing": "ij", "rope_temperature": config.rope_theta,
            "use_abs_pos_emb": config.position_embeddings != "none", "num_reg_tokens": config.num_register_tokens,
            "use_fc_norm": config.fc_norm, "swiglu_mlp": config.swiglu, "swiglu_align_to": 0,
        }  # fmt: skip
    else:
        arguments |= {
            "reg_tokens": config.num_register_tokens, "fc_norm": config.fc_norm,
            "pos_embed": "none" if config.position_embeddings == "none" else "learn",
        }  # fmt: skip
        if not config.swiglu:
            if config.hidden_act not in _ACTIVATIONS:
                known = ", ".join(_ACTIVATIONS)
                raise ConfigError(f"hidden_act={config.hidden_act!r}: --to timm writes {known}; take --to hf")
            arguments |= {"act_layer": _ACTIVATIONS[config.hidden_act], "pre_norm": False}
    notes = []
    if eps != config.layer_norm_eps:
        was = f"layer_norm_eps={config.layer_norm_eps} became {eps}: timm has no argument for it"
        notes.append(f"{was}; from_pretrained(FROM, layer_norm_eps={eps}) is the model that timm will have")
    return architecture, arguments, notes


def _architecture(config: ViTConfig) -> tuple[str, float]:
    """The architecture to start from, and the eps of its layer norms, the nearest that timm has."""
    if config.rope_theta is not None:
        choices = {1e-6: _ROTARY, 1e-5: _ROTARY_EPS5}
    elif config.swiglu:
        choices = {1e-6: _SWIGLU}
    else:
        name = f"vit_{_BY_WIDTH.get(config.hidden_size)}_patch{config.patch_size}_224"
        choices = {1e-6: name if name in ARCHITECTURES else _PLAIN, 1e-5: _PLAIN_EPS5}
    eps = min(choices, key=lambda each: abs(math.log10(each / max(config.layer_norm_eps, 1e-30))))
    return choices[eps], eps
