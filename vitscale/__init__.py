"""vitscale: pretrain Vision Transformers at scale."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# The public names and where each is defined; loaded when asked for, since they need torch.
_PUBLIC = {
    "ViTConfig": "vitscale.models.configuration",
    "ViTMAEConfig": "vitscale.models.configuration_mae",
    "ViTModel": "vitscale.models.vit",
    "ViTForImageClassification": "vitscale.models.classification",
    "ViTForMaskedImageModeling": "vitscale.models.simmim",
    "ViTMAEForPreTraining": "vitscale.models.mae",
    "ViTForMultitaskPreTraining": "vitscale.models.multitask",
    "AutoConfig": "vitscale.interop.auto",
    "AutoModel": "vitscale.interop.auto",
    "AutoModelForImageClassification": "vitscale.interop.auto",
    "AutoModelForMaskedImageModeling": "vitscale.interop.auto",
    "AutoModelForPreTraining": "vitscale.interop.auto",
    "ViTImageProcessor": "vitscale.interop.image_processing",
    "AutoImageProcessor": "vitscale.interop.auto",
    "VitscaleError": "vitscale.errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitscale' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
