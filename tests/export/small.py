"""Models small enough to export in seconds, and pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.data.makers import pixels
from vitscale.interop.pretrained import save_model
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.vit import ViTPreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "encoder_stride": 8,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.2,  # so that answers differ from image to image
}
# Every option of a ViTConfig that changes the graph, some at once.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not square": {"image_size": (24, 32), "patch_size": (8, 4), "num_channels": 4, "qkv_bias": False},
    "dinov3": {"position_embeddings": "none", "rope_theta": 100.0, "num_register_tokens": 2, "swiglu": True,
               "layer_scale_init_value": 0.5},
    "timm": {"use_cls_token": False, "pooling": "mean", "fc_norm": True, "qk_norm": True,
             "position_embeddings": "sincos"},
}  # fmt: skip


def small(model_class: type[ViTPreTrainedModel] = ViTForImageClassification, **keys: Any) -> ViTPreTrainedModel:
    """An initialized model in evaluation mode, its biases and norms no special numbers."""
    labels = {"num_labels": 5} if model_class is ViTForImageClassification else {}
    model = model_class(model_class.config_class(**SIZES | labels | keys))
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def saved(model: ViTPreTrainedModel, folder: Path) -> Path:
    save_model(folder, type(model).__name__, model.config, model.state_dict(), (0.5,), (0.25,))
    return folder


def noise(n: int, model: ViTPreTrainedModel, size: tuple[int, int] | None = None) -> torch.Tensor:
    height, width = size or model.config.image_size if isinstance(model.config.image_size, tuple) else size or (32, 32)
    return torch.randn(n, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(n))


def write_pictures(folder: Path, count: int, classes: int = 5) -> Path:
    """PNGs in one folder a class, that model by model get different answers."""
    for number in range(count):
        place = folder / f"class{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number, 32, 32)).save(place / f"{number:03d}.png")
    return folder
