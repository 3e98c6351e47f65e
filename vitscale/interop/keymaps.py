"""Our parameter names and transformers' names on disk, as tables.

On disk stand the names of transformers 4, which transformers 5 still writes and reads, and which
are what the hub is full of: query, key and value apart, our one matrix their rows one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

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
    theirs: tuple[str, ...]


def place(name: str) -> Place:
    """The names on disk of one of our parameters."""
    theirs = name
    for old, new in _RENAMES:
        theirs = theirs.replace(old, new, 1)
    parts = tuple(theirs.replace(_QKV, part) for part in _PARTS) if _QKV in theirs else (theirs,)
    return Place(name, parts)


def places(names: Iterable[str]) -> list[Place]:
    return [place(name) for name in names]


def canonical(name: str) -> str:
    """A name found on disk as the tables above have it."""
    for alias, usual in _ALIASES:
        name = alias.sub(usual, name, count=1)
    return name
