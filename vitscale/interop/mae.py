"""The .pth files of facebookresearch/mae: pretrained (encoder and decoder, or encoder alone) and fine-tuned.

Such a file holds tensors by the names of its models_mae.py or models_vit.py, and seldom more: what it does
not say is taken from the sizes that this repository trains, or has to be given.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.vision_transformer import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Opened,
    build,
    depth,
    read_pth,
    require,
)
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.mae import ViTMAEConfig, ViTMAEForPreTraining
from vitscale.models.positions import is_table, sincos_table
from vitscale.models.vit import ViTModel, ViTPreTrainedModel
from vitscale.text import listed

EPS = 1e-6  # of every layer norm in models_mae.py and models_vit.py
# Heads by width, of the models in models_mae.py and models_vit.py.
_HEADS, _DECODER_HEADS = {768: 12, 1024: 16, 1280: 16}, {512: 16}
# What a file may leave open, and a caller may say.
_KEYS_OF_ENCODER = ("num_attention_heads", "image_size")
KEYS = (*_KEYS_OF_ENCODER, "decoder_num_attention_heads", "norm_pix_loss")
WRITTEN = "vitscale"  # where our files say what MAE's do not


def read_mae(path: Path, given: Mapping[str, Any]) -> Opened:
    """The model of a .pth: a ViTMAEForPreTraining, an encoder alone, or a fine-tuned ViTForImageClassification.

    given: what the file leaves open, of KEYS. CheckpointError for a file that is broken or holds other
    tensors, ConfigError where a key must be given, or cannot.
    """
    content = read_pth(path)
    tensors = _tensors(content, path)
    count = len(tensors)
    said = {**_said(content), **given}
    if "decoder_embed.weight" in tensors:
        model_class: type[ViTPreTrainedModel] = ViTMAEForPreTraining
    elif "head.weight" in tensors or "fc_norm.weight" in tensors:
        model_class = ViTForImageClassification
    else:
        model_class = ViTModel
    leaves_open = KEYS if model_class is ViTMAEForPreTraining else _KEYS_OF_ENCODER
    for name in given.keys() - set(leaves_open):
        raise ConfigError(f"{name}={given[name]!r}: {path} leaves open no more than {', '.join(leaves_open)}")
    config, notes = _config(model_class, tensors, said, str(path))
    if config.position_embeddings == "sincos":  # recomputed, no parameters
        tensors = {name: tensor for name, tensor in tensors.items() if name not in _widths(config)}
    model = build(model_class, config, {name: tensor.float() for name, tensor in tensors.items()}, str(path))
    return Opened("mae", model, _processor(config, content, path), count, notes)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    model = content.get("model", content) if isinstance(content, dict) else None
    if isinstance(model, dict) and model and all(isinstance(value, Tensor) for value in model.values()):
        return {str(name): tensor for name, tensor in model.items()}
    held = listed(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(f"{path}: must hold tensors by name, or such under 'model', and holds {held}")


def _said(content: dict[str, Any]) -> dict[str, Any]:
    """What the file says of KEYS: by our own note, or by the arguments of the run that wrote it."""
    written = content.get(WRITTEN)
    said: dict[str, Any] = {}
    if isinstance(content.get("args"), argparse.Namespace):
        arguments = vars(content["args"])
        said = {name: arguments[name] for name in ("norm_pix_loss",) if isinstance(arguments.get(name), bool)}
    if isinstance(written, dict):
        said |= {name: written[name] for name in (*KEYS, "mask_ratio", "id2label") if name in written}
    return said


def _config(
    model_class: type[ViTPreTrainedModel], tensors: dict[str, Tensor], said: dict[str, Any], where: str
) -> tuple[ViTConfig, list[str]]:
    needed = ["patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight"]
    decodes = model_class is ViTMAEForPreTraining
    needed += ["decoder_pos_embed", "decoder_blocks.0.mlp.fc1.weight"] if decodes else []
    require(needed, tensors, where)
    width, channels, *patch = tensors["patch_embed.proj.weight"].shape
    patches = tensors["pos_embed"].shape[1] - 1
    notes: list[str] = []
    keys: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth(tensors, "blocks"),
        "num_attention_heads": _heads("num_attention_heads", width, _HEADS, said, where),
        "intermediate_size": len(tensors["blocks.0.mlp.fc1.weight"]),
        "layer_norm_eps": EPS,
        "image_size": said["image_size"] if "image_size" in said else _square(patches, patch, where),
        "patch_size": (patch[0], patch[1]),
        "num_channels": channels,
        "encoder_stride": patch[0],
    }
    if decodes:
        keys |= _decoder_keys(tensors, said, where)
        if "norm_pix_loss" not in said:
            notes.append("norm_pix_loss: the file does not say; false, as models_mae.py has it, changes the loss alone")
    elif model_class is ViTForImageClassification:
        classes, names = len(tensors.get("head.weight", ())), said.get("id2label")
        if isinstance(names, dict) and len(names) != classes:
            raise CheckpointError(f"{where}: its note has id2label of {len(names)} names, and its head {classes} rows")
        keys |= {"num_labels": classes, "id2label": names}
        if "fc_norm.weight" in tensors:  # global_pool
            keys |= {"fc_norm": True, "pooling": "mean"}
    config_class = ViTMAEConfig if decodes else ViTConfig
    try:
        config = config_class(**keys, position_embeddings="learned")
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if config.num_patches != patches:
        raise ConfigError(
            f"image_size={config.image_size}: {where} has positions for {patches} patches of {config.patch_size}; "
            "give image_size=H,W that make as many"
        )
    if _is_fixed(tensors, config):
        config = config_class(**keys, position_embeddings="sincos")
        if tensors["pos_embed"].dtype != torch.float32:
            notes.append(f"pos_embed: MAE's table, of {tensors['pos_embed'].dtype} in the file, is computed anew")
    return config, notes


def _heads(key: str, width: int, usual: dict[int, int], said: dict[str, Any], where: str) -> int:
    if key in said:
        return said[key]
    if width in usual:
        return usual[width]
    raise ConfigError(
        f"{key}: {where} does not say, and its width {width} is none of MAE's ({listed(sorted(map(str, usual)))}); "
        f"give {key}=N"
    )


def _square(patches: int, patch: list[int], where: str) -> tuple[int, int]:
    """The image size of as many patches along both sides."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConfigError(f"image_size: {where} has positions for {patches} patches, no square; give image_size=H,W")
    return side * patch[0], side * patch[1]


def _decoder_keys(tensors: dict[str, Tensor], said: dict[str, Any], where: str) -> dict[str, Any]:
    width = tensors["decoder_pos_embed"].shape[-1]
    return {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": depth(tensors, "decoder_blocks"),
        "decoder_num_attention_heads": _heads("decoder_num_attention_heads", width, _DECODER_HEADS, said, where),
        "decoder_intermediate_size": len(tensors["decoder_blocks.0.mlp.fc1.weight"]),
        "norm_pix_loss": said.get("norm_pix_loss", False),
        "mask_ratio": said.get("mask_ratio", 0.75),
    }


def _widths(config: ViTConfig) -> dict[str, int]:
    """The position tables of a model, and their widths."""
    decoder = {"decoder_pos_embed": config.decoder_hidden_size} if isinstance(config, ViTMAEConfig) else {}
    return {"pos_embed": config.hidden_size, **decoder}


def _is_fixed(tensors: dict[str, Tensor], config: ViTConfig) -> bool:
    """Whether all positions are the tables that MAE starts from (and keeps, in pretraining)."""
    widths = _widths(config).items()
    return all(width % 4 == 0 and is_table(tensors[name], sincos_table(width, config.grid)) for name, width in widths)


def _processor(config: ViTConfig, content: dict[str, Any], path: Path) -> ViTImageProcessor:
    """Our own note, else main_finetune.py's evaluation: bicubic to 256 for 224, the middle, ImageNet's numbers."""
    written = content.get(WRITTEN)
    if isinstance(written, dict) and isinstance(written.get("processor"), dict):
        note = {str(key): value for key, value in written["processor"].items()}
        return ViTImageProcessor.from_dict(note, f"{path}: its note on images")
    height, width = pair(config.image_size)
    same = config.num_channels == len(IMAGENET_MEAN)
    square = height == width <= 224  # larger ones are resized as they are
    return ViTImageProcessor(
        do_convert_rgb=same,
        size={"shortest_edge": int(height / (224 / 256))} if square else (height, width),
        resample=Image.Resampling.BICUBIC,
        do_center_crop=square,
        crop_size=(height, width) if square else None,
        image_mean=IMAGENET_MEAN if same else (0.5,) * config.num_channels,
        image_std=IMAGENET_STD if same else (0.5,) * config.num_channels,
    )
