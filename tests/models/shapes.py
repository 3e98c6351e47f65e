"""Models small enough for a test, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitscale import rng
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTPreTrainedModel

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
DECODER = {
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 12,
}

# Every option that any model can have, each of them on.
EVERY_OPTION = {
    "use_cls_token": False,
    "pooling": "mean",
    "num_register_tokens": 3,
    "position_embeddings": "none",
    "rope_theta": 100.0,
    "layer_scale_init_value": 0.5,
    "qk_norm": True,
    "swiglu": True,
}
OPTION_SETS = {"plain": {}, "options": EVERY_OPTION, "registers": {"num_register_tokens": 2}}


def tiny(model_class: type[ViTPreTrainedModel], **keys: Any) -> ViTPreTrainedModel:
    """A tiny initialized model, in training mode."""
    config = model_class.config_class(**tiny_keys(model_class) | keys)
    model = model_class(config)
    initialize(model, seed=0)
    return model


def tiny_keys(model_class: type[ViTPreTrainedModel]) -> dict[str, Any]:
    if model_class.config_class is ViTMAEConfig:
        return TINY | DECODER
    return TINY | {"encoder_stride": TINY["patch_size"], "num_labels": 5}


TRAINABLE = [
    ViTMAEForPreTraining,
    ViTForMaskedImageModeling,
    ViTForImageClassification,
    ViTForMultitaskPreTraining,
]


def inputs(model: ViTPreTrainedModel, n: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """What the loop gives this model: pixels, keys, and labels where it has a classifier."""
    config: ViTConfig = model.config
    generator = torch.Generator().manual_seed(seed)
    size = config.image_size if isinstance(config.image_size, tuple) else (config.image_size,) * 2
    batch = {
        "pixel_values": torch.randn(n, config.num_channels, *size, generator=generator),
        "sample_key": rng.sample_key(seed, 0, torch.arange(n)),
    }
    if hasattr(model, "classifier"):
        batch["labels"] = torch.arange(n) % config.num_labels
    return batch
