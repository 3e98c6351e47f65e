"""Small models of timm, and ours to compare with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conversion.comparing import close, shaken
from tests.models.shapes import TINY
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.pretrained import processor_dict
from vitscale.interop.vision_transformer import Opened
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

timm = pytest.importorskip("timm")

PLAIN, SWIGLU, GAP = "vit_tiny_patch16_224", "vit_giant_patch14_dinov2", "vit_base_patch16_gap_224"
SMALL: dict[str, Any] = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL |= {"num_classes": 5}


def tiny_timm(architecture: str, **arguments: Any) -> Any:
    return shaken(timm.create_model(architecture, **SMALL | arguments))


def save_theirs(model: nn.Module, folder: Path) -> Path:
    """As timm's own export (push_to_hf_hub) does."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


def open_theirs(folder: Path) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def opened_ours(model_class: type[ViTPreTrainedModel] = ViTForImageClassification, **keys: Any) -> Opened:
    config = model_class.config_class(**TINY | {"layer_norm_eps": 1e-6, "encoder_stride": 4, "num_labels": 5} | keys)
    model = model_class(config)
    initialize(model, 0)
    return Opened("hf", shaken(model), processor(config), 0)


def processor(config: ViTConfig) -> ViTImageProcessor:
    return ViTImageProcessor.from_dict(processor_dict(config, (0.5,), (0.25,)))


@torch.no_grad()
def assert_equal(ours: ViTPreTrainedModel, theirs: Any) -> None:
    """Every token's features, and the logits (without a head: the pooled features)."""
    size = ours.config.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    x = torch.randn(3, ours.config.num_channels, height, width, generator=torch.Generator().manual_seed(2))
    features = theirs.forward_features(x)
    if isinstance(ours, ViTModel):
        close(ours(x).last_hidden_state, features)
        return
    close(ours.vit(x).last_hidden_state, features)  # type: ignore[operator]
    if isinstance(ours, ViTForImageClassification):
        close(ours(x).logits, theirs(x))
