"""Floating-point operations of one image's forward, counted from the shapes.

A multiply and an add are two operations. Counted are the matrix products (the linear layers and
the two products of attention); norms, activations and softmax are left out, as is usual for model
FLOPs utilization. Training is three times the forward; recomputation in backward is no part of it.
"""

from __future__ import annotations

from vitscale.models.configuration import ViTConfig


def linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def blocks(config: ViTConfig, tokens: int) -> int:
    """All transformer blocks over `tokens` tokens."""
    width, hidden = config.hidden_size, config.intermediate_size
    projections = linear(tokens, width, 3 * width) + linear(tokens, width, width)
    attention = 2 * linear(tokens, width, tokens)
    mlp = linear(tokens, width, hidden) + linear(tokens, hidden, width)
    return config.num_hidden_layers * (projections + attention + mlp)


def encoder(config: ViTConfig, patches: int | None = None) -> int:
    """ViTModel without its pooler: embeds every patch, runs the blocks over `patches` of them (None: all)."""
    visible = config.num_patches if patches is None else patches
    return linear(config.num_patches, config.patch_values, config.hidden_size) + blocks(config, 1 + visible)
