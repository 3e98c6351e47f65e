"""What a ViT's keys must satisfy, whoever gives them: a run's config, config.json or a Python caller.

What is broken comes as a `Violation` of one key, worded with the other keys that it speaks of. ViTConfig raises the
first one as it is; config/schema.py and check.py put `model.` before the keys, and say what to set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Size = int | tuple[int, int]  # a square's side, or (height, width)
Name = Callable[[str], str]  # how a caller writes a key

POSITIONS = ("learned", "sincos", "none")
POOLINGS = ("cls", "mean")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
ACTIVATIONS = (  # those of models/activations.py
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
    "sqrtsoftplus", "swish", "tanh",
)  # fmt: skip
MOST_LABELS = 1_000_000  # a file that says more is damaged; each of them gets a name
_LEAST = {
    "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 1, "intermediate_size": 1,
    "image_size": 1, "patch_size": 1, "num_channels": 1, "encoder_stride": 1, "pooler_output_size": 1, "mask_patch": 1,
    "num_register_tokens": 0, "decoder_hidden_size": 1, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 1, "decoder_intermediate_size": 1,
}  # fmt: skip
# What says more is damaged, or meant to harm: modules and tables would be made of it before a tensor is compared.
_MOST = {
    "hidden_size": 1 << 17, "num_hidden_layers": 4096, "num_attention_heads": 1 << 14, "head_dim": 1 << 14,
    "intermediate_size": 1 << 20, "image_size": 1 << 17, "patch_size": 1 << 17, "num_channels": 1 << 16,
    "num_register_tokens": 1 << 16, "decoder_hidden_size": 1 << 17, "decoder_num_hidden_layers": 4096,
    "decoder_num_attention_heads": 1 << 14, "decoder_intermediate_size": 1 << 20, "pooler_output_size": 1 << 20,
}  # fmt: skip
_MOST_PATCHES = 1 << 20
_SHARES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "mask_ratio", "label_smoothing")
_POSITIVE = ("layer_norm_eps", "initializer_range", "rope_theta")
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "position_embeddings": POSITIONS,
    "pooling": POOLINGS,
    "problem_type": (*PROBLEM_TYPES, None),
    "hidden_act": ACTIVATIONS,
    "pooler_act": ACTIVATIONS,
}


class Violation(NamedTuple):
    key: str
    value: Any
    rule: str  # what the value must be


def pair(value: Size) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (value, value) if isinstance(value, int) else value


def of_values(values: Mapping[str, Any]) -> Iterator[Violation]:
    """Of single values, those of the keys that are there; null is every key's business that has it."""
    given = {key: value for key, value in values.items() if value is not None}
    for key, least in _LEAST.items():
        if key in given and min(pair(given[key])) < least:
            yield Violation(key, given[key], f"{least} or more")
    for key, most in _MOST.items():
        if key in given and max(pair(given[key])) > most:
            yield Violation(key, given[key], f"at most {most}")
    for key, choices in _CHOICES.items():
        if key in given and given[key] not in choices:
            yield Violation(key, given[key], f"one of {', '.join(map(str, choices))}")
    for key in _SHARES:
        if key in given and not 0 <= given[key] < 1:
            yield Violation(key, given[key], "in [0, 1)")
    for key in _POSITIVE:
        if key in given and given[key] <= 0:
            yield Violation(key, given[key], "above 0")
    if not 0 <= given.get("num_labels", 0) <= MOST_LABELS:
        yield Violation("num_labels", given["num_labels"], f"0 (features only) to {MOST_LABELS}")


def of_encoder(values: Mapping[str, Any], positions: str, name: Name = str) -> Iterator[Violation]:
    """Of keys together. positions: the kind that the encoder has (position_embeddings may be `auto`)."""
    image, patch = values["image_size"], values["patch_size"]
    for axis, side, part in zip(("height", "width"), pair(image), pair(patch), strict=True):
        if side % part:
            yield Violation("image_size", image, f"a multiple of {name('patch_size')}={patch} in its {axis}")
    patches = math.prod(side // part for side, part in zip(pair(image), pair(patch), strict=True))
    if patches > _MOST_PATCHES:
        yield Violation("image_size", image, f"at most {_MOST_PATCHES} patches of {name('patch_size')}={patch}")
    if not values["use_cls_token"] and values["pooling"] != "mean":
        yield Violation("pooling", values["pooling"], f"mean where {name('use_cls_token')}=false")
    if values["problem_type"] == "single_label_classification" and values["num_labels"] == 1:
        yield Violation("num_labels", 1, f"2 or more for {name('problem_type')}=single_label_classification")
    yield from of_blocks(values, positions, "", name)


def of_blocks(values: Mapping[str, Any], positions: str, prefix: str = "", name: Name = str) -> Iterator[Violation]:
    """Of the width, heads and positions of the encoder's blocks, or with prefix="decoder_" of an MAE's decoder's."""
    key, heads_key = f"{prefix}hidden_size", f"{prefix}num_attention_heads"
    width, heads, head_width = values[key], values[heads_key], values.get("head_dim")
    if head_width is None and width % heads:
        yield Violation(key, width, f"a multiple of {name(heads_key)}={heads}")
    if positions == "sincos" and width % 4:
        yield Violation(key, width, "a multiple of 4 for sincos position embeddings")
    if values["rope_theta"] is None:
        return
    # Rotary positions turn pairs of features, half of them by the row and half by the column.
    if head_width is not None and head_width % 4:
        yield Violation("head_dim", head_width, "a multiple of 4 for rope_theta")
    if head_width is None and width // heads % 4:
        yield Violation(key, width, f"{name(heads_key)}={heads} times a multiple of 4 for {name('rope_theta')}")


def of_pretraining(values: Mapping[str, Any], positions: str, model: str, name: Name = str) -> Iterator[Violation]:
    """A model that predicts hidden patches must know where they are: else it says the same of all of them."""
    if positions == "none" and values["rope_theta"] is None:
        yield Violation("position_embeddings", "none", f"learned or sincos for {model}, or {name('rope_theta')} set")
