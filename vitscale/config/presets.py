"""Sizes of the standard ViTs: by the papers' letters, and by the resources at hand.

Ti, S: Touvron et al. 2021 (DeiT); B, L, H: Dosovitskiy et al. 2021; g, G: Zhai et al. 2022
(Scaling Vision Transformers, table 2). low, medium, high: what a laptop, a GPU and a node of GPUs
train: a narrow ViT, B, and L at 384 pixels.
"""

from typing import Any

from vitscale.errors import ConfigError

_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
_SIZES = {
    "Ti": (192, 12, 3, 768, 16),
    "S": (384, 12, 6, 1536, 16),
    "B": (768, 12, 12, 3072, 16),
    "L": (1024, 24, 16, 4096, 16),
    "H": (1280, 32, 16, 5120, 14),
    "g": (1408, 40, 16, 6144, 14),
    "G": (1664, 48, 16, 8192, 14),
    "low": (256, 6, 8, 1024, 16),
    "medium": (768, 12, 12, 3072, 16),
    "high": (1024, 24, 16, 4096, 16),
}
_IMAGE_SIZES = {"high": 384}  # 224 otherwise


def preset(name: str) -> dict[str, Any]:
    """The ViTConfig keys of a preset; what is written elsewhere stands over them."""
    if name not in _SIZES:
        raise ConfigError(f"model.preset={name!r}: must be one of {', '.join(_SIZES)}, or null with sizes of your own")
    keys = dict(zip(_KEYS, _SIZES[name], strict=True))
    return keys | {"image_size": _IMAGE_SIZES[name]} if name in _IMAGE_SIZES else keys


PRESET_KEYS = _KEYS
