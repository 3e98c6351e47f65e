"""Our parameter names and transformers' names on disk, as tables.

On disk stand the names of transformers 4, which transformers 5 still writes and reads, and which
are what the hub is full of: query, key and value apart, our one matrix their rows one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Rewritten in our name, each at most once.
_RENAMES = (
    ("encoder.layers.", "encoder.layer."),
    ("decoder.transformer.layers.", "decoder.decoder_layers."),
    (".attention.output.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
_QKV, PARTS = ".qkv.", (".query.", ".key.", ".value.")

# What their classes with a head call the encoder: ViT's, DINOv2's, I-JEPA's; there is no other prefix.
ENCODERS = ("vit", "dinov2", "dinov2_with_registers", "ijepa")
# Names that only some writers use, and what stands for them above: transformers 5 saves MAE's decoder
# by the first; q_proj to fc2 are its names in memory, which save_pretrained(save_original_format=False)
# and torch.save(model.state_dict()) write; the rest are of DINOv2 and DINOv3.
_ALIASES = (
    (re.compile(r"^decoder\.decoder_encoder\.layer\."), "decoder.decoder_layers."),
    (re.compile(rf"^({'|'.join(ENCODERS)})\."), "vit."),
    (re.compile(r"^(vit\.)?(model\.)?layers?\."), r"\1encoder.layer."),
    (re.compile(r"^(vit\.)?norm\."), r"\1layernorm."),
    (re.compile(r"\.patch_embeddings\.(weight|bias)$"), r".patch_embeddings.projection.\1"),
    (re.compile(r"\.norm1\."), ".layernorm_before."),
    (re.compile(r"\.norm2\."), ".layernorm_after."),
    (re.compile(r"\.layer_scale1\.lambda1$"), ".layer_scale_before"),
    (re.compile(r"\.layer_scale2\.lambda1$"), ".layer_scale_after"),
    (re.compile(r"\.mlp\.(weights_in|up_proj)\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.(weights_out|down_proj)\."), ".output.dense."),
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
)


class Place(NamedTuple):
    """Where one of our tensors is on disk: the names whose rows, one below the other, are it."""

    ours: str
    names: tuple[str, ...]


def place(name: str) -> Place:
    """The names on disk of one of our parameters."""
    on_disk = name
    for old, new in _RENAMES:
        on_disk = on_disk.replace(old, new, 1)
    if _QKV in on_disk:
        return Place(name, tuple(on_disk.replace(_QKV, part) for part in PARTS))
    return Place(name, (on_disk,))


def places(names: Iterable[str]) -> list[Place]:
    return [place(name) for name in names]


def ours_from_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names above as ours; what has no partner keeps its name."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = next((part for part in PARTS if part in name), None)
        rows = [tensors.get(name.replace(part, each)) for each in PARTS] if part else []
        parts = [each for each in rows if each is not None and each.shape == tensor.shape]
        renamed = name
        for new, old in _RENAMES:
            renamed = renamed.replace(old, new, 1)
        if len(parts) != len(PARTS):
            ours[renamed] = tensor
        elif part == PARTS[0]:
            ours[renamed.replace(part, _QKV)] = torch.cat(parts)
    return ours


def canonical(name: str) -> str:
    """A name found on disk as the tables above have it."""
    for alias, standard in _ALIASES:
        name = alias.sub(standard, name, count=1)
    return name
