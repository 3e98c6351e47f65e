"""A model as a folder of timm: its config.json and weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from vitscale.files.model_folder import CONFIG, as_text
from vitscale.interop.timm import arguments_for
from vitscale.interop.timm_inputs import input_content
from vitscale.interop.vision_transformer import Opened, by_timm_names
from vitscale.interop.weight_files import write_folder


def write_timm(folder: Path, opened: Opened) -> tuple[list[str], list[str]]:
    """Write a folder that timm.create_model("local-dir:FOLDER", pretrained=True) opens.

    Gives the names of our tensors that timm has no place for (a decoder, a pooler, a mask token), and
    notes on what it says otherwise. ConfigError that names what timm cannot express.
    """
    config = opened.model.config
    architecture, arguments, notes = arguments_for(config)
    tensors, left_out = by_timm_names(opened.model)
    registers, cls = config.num_register_tokens, int(config.use_cls_token)
    if registers and "pos_embed" in tensors:  # a position of zero for each
        positions = tensors["pos_embed"]
        zeros = positions.new_zeros(1, registers, config.hidden_size)
        tensors["pos_embed"] = torch.cat([positions[:, :cls], zeros, positions[:, cls:]], dim=1)
    if config.rope_theta is not None:
        tensors = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): tensor for name, tensor in tensors.items()}  # Eva's
    classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    content: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": config.hidden_size,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "vitscale",
            "custom_load": False,
            **input_content(opened.processor, config),
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if config.id2label is not None and config.has_class_names and classes:
        content["label_names"] = [config.id2label[number] for number in sorted(config.id2label)]
    write_folder(folder, {CONFIG: as_text(content)}, tensors)
    return left_out, notes
