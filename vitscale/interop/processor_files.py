"""preprocessor_config.json, ours and transformers', as the keys of ViTImageProcessor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from PIL import Image

from vitscale.errors import CheckpointError
from vitscale.files.model_folder import PROCESSOR
from vitscale.files.sources import locate
from vitscale.interop.timm_names import IMAGENET_MEAN, IMAGENET_STD
from vitscale.text import listed, to_stderr

# Processors of transformers that do the same, by what they start from: those of ViT, DINOv2 and DINOv3.
_STARTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {},
    "BitImageProcessor": {
        "do_convert_rgb": True, "size": 224, "default_to_square": False, "resample": Image.Resampling.BICUBIC,
        "do_center_crop": True, "crop_size": 224, "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "DINOv3ViTImageProcessor": {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
    "DeiTImageProcessor": {
        "size": 256, "resample": Image.Resampling.BICUBIC, "do_center_crop": True, "crop_size": 224,
        "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD,
    },
}  # fmt: skip
_STARTS["CLIPImageProcessor"] = _STARTS["BitImageProcessor"]
# What transformers 3 to 5 call them on disk.
_EXTRACTORS = ("ViTFeatureExtractor", "DeiTFeatureExtractor", "CLIPFeatureExtractor")
TYPES = (*(name + suffix for name in _STARTS for suffix in ("", "Fast", "Pil")), *_EXTRACTORS)
# Keys of preprocessor_config.json that say nothing of how pixels are made; and those that may only say this.
_REMARKS = {"image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys", "auto_map"}
_REMARKS |= {"_valid_kwargs_names", "device", "disable_grouping", "return_tensors", "pad_size", "vitscale_version"}
# Of other processors, beside do_*: what would make other pixels.
_STEPS = {"crop_pct", "offset", "size_divisor", "size_divisibility", "pad_val", "do_pad"}
_RULES = {"data_format": ("channels_first", None), "default_to_square": (True, False, None)}


def known_keys(content: dict[str, Any], names: set[str], where: str) -> dict[str, Any]:
    """The keys of a file that are `names`, with the defaults of the processor that wrote it.

    CheckpointError, with `where`, for another processor and for steps that ours does not do; other keys are named on
    stderr and passed over.
    """
    kind = content.get("image_processor_type") or content.get("feature_extractor_type") or TYPES[0]
    if kind not in TYPES:
        raise CheckpointError(
            f"{where}: image_processor_type={kind!r}: must be one of {', '.join(_STARTS)}; where it does the same, "
            "write such a name there"
        )
    content = _STARTS[re.sub("(Fast|Pil)$", "", kind.replace("FeatureExtractor", "ImageProcessor"))] | content
    unknown = sorted(str(name) for name in content.keys() - names - _REMARKS if _is_unmet(name, content[name]))
    if unmet := [name for name in unknown if name.startswith("do_") or name in {*_STEPS, *_RULES}]:
        raise CheckpointError(
            f"{where}: key(s) {', '.join(unmet)} ask for what this processor does not do; take them away there"
        )
    if unknown:
        to_stderr(f"{where}: passed over, no keys of a {kind}: {listed(unknown)}")
    known = {name: value for name, value in content.items() if name in names}
    if not content.get("default_to_square", True) and type(content.get("size")) is int:
        known["size"] = {"shortest_edge": content["size"]}
    return known


def _is_unmet(name: str, value: Any) -> bool:
    """Whether a key that is no field of ours wants pixels made in another way than they are here."""
    return value not in _RULES[name] if name in _RULES else value is not None and value is not False


def processor_file(source: str | Path, where: dict[str, Any]) -> Path:
    """The preprocessor_config.json of a source; where: options of sources.locate."""
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        return path
    try:
        return locate(source, only=PROCESSOR, **where) / PROCESSOR
    except CheckpointError as error:
        hint = "ViTImageProcessor(size=..., image_mean=..., image_std=...).save_pretrained(folder) makes one"
        raise CheckpointError(f"{error}; {hint}" if path.is_dir() else str(error)) from None
