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
_QKV, _PARTS = ".qkv.", (".query.", ".key.", ".value.")

# Names that only some writers use, and what stands for them above: transformers 5 saves MAE's decoder
# by the first; the others are its names in memory, which save_pretrained(save_original_format=False)
# and torch.save(model.state_dict()) write.
_ALIASES = (
    (re.compile(r"^decoder\.decoder_encoder\.layer\."), "decoder.decoder_layers."),
    (re.compile(r"^(vit\.)?layers\."), r"\1encoder.layer."),
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
        return Place(name, tuple(on_disk.replace(_QKV, part) for part in _PARTS))
    return Place(name, (on_disk,))


def places(names: Iterable[str]) -> list[Place]:
    return [place(name) for name in names]


def ours_from_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by transformers' names as ours, an encoder's under `vit.`; what has no partner keeps its name."""
    named = {canonical(name): tensor for name, tensor in tensors.items()}
    prefix = "" if any(name.startswith("vit.") for name in named) else "vit."
    ours: dict[str, Tensor] = {}
    for name, tensor in named.items():
        part = next((part for part in _PARTS if part in name), None)
        rows = [named.get(name.replace(part, each)) for each in _PARTS] if part else []
        parts = [each for each in rows if each is not None and each.shape == tensor.shape]
        renamed = name
        for new, old in _RENAMES:
            renamed = renamed.replace(old, new, 1)
        if len(parts) != len(_PARTS):
            ours[prefix + renamed] = tensor
        elif part == _PARTS[0]:
            ours[prefix + renamed.replace(part, _QKV)] = torch.cat(parts)
    return ours


def canonical(name: str) -> str:
    """A name found on disk as the tables above have it."""
    for alias, standard in _ALIASES:
        name = alias.sub(standard, name, count=1)
    return name
