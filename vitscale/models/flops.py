"""Floating-point operations of one image's forward, counted from the shapes.

A multiply and an add are two operations. Counted are the matrix products (the linear layers and
the two products of attention); norms, activations, gates, rotations and softmax are left out, as is
usual for model FLOPs utilization. Training is three times the forward; recomputation in backward is
no part of it.
"""

from __future__ import annotations

from vitscale.models.configuration import ViTConfig


def linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def blocks(config: ViTConfig, tokens: int) -> int:
    """All transformer blocks over `tokens` tokens."""
    width, hidden, heads = config.hidden_size, config.intermediate_size, config.attention_width
    projections = linear(tokens, width, 3 * heads) + linear(tokens, heads, width)
    attention = 2 * linear(tokens, heads, tokens)
    mlp = linear(tokens, width, 2 * hidden if config.swiglu else hidden) + linear(tokens, hidden, width)
    return config.num_hidden_layers * (projections + attention + mlp)


def encoder(config: ViTConfig, patches: int | None = None) -> int:
    """ViTModel without its pooler, of so many patches (None: all)."""
    patches = config.num_patches if patches is None else patches
    embedding = linear(patches, config.patch_values, config.hidden_size)
    return embedding + blocks(config, config.num_prefix_tokens + patches)
