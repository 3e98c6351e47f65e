"""config.json -> a config of ours, and back; and configs made from others."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from vitscale.errors import CheckpointError, ConfigError
from vitscale.files.model_folder import read_json
from vitscale.interop.their_configs import THEIRS, translated
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig

CONFIGS: dict[str, type[ViTConfig]] = {each.model_type: each for each in (ViTConfig, ViTMAEConfig)}
MODEL_TYPES = (*(prefix + name for prefix in ("", "vitscale_") for name in CONFIGS), *THEIRS)


def architecture(path: Path, content: dict[str, Any]) -> str:
    """The class that config.json says the model is of, "" where it says none. CheckpointError for anything else."""
    named = content.get("architectures") or [""]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{path}: architectures={named!r}: must be a list with a class's name, or left out")
    return named[0]


def read_config(path: Path, content: dict[str, Any] | None = None) -> ViTConfig:
    """The config in a file, of the class that its model_type tells.

    content: what is in it, if it has been read. CheckpointError if model_type is not one of MODEL_TYPES, or a value is
    none that our ViT can have.
    """
    content = read_json(path) if content is None else content
    kind = content.get("model_type")
    require_model_type(path, kind)
    try:
        if kind in THEIRS:
            return ViTConfig.from_dict(translated(content))
        return CONFIGS[str(kind).removeprefix("vitscale_")].from_dict(content)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def require_model_type(path: Path, kind: Any) -> None:
    """CheckpointError, with what to do, for a model_type that is none of MODEL_TYPES."""
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type={kind!r}: must be one of {', '.join(MODEL_TYPES)}; take a model of one of these, the "
            "same model as a folder of timm, or, if it is a plain ViT by timm's names, its file of weights alone, "
            "without this config.json beside it"
        )


def ignored_keys(config: ViTConfig, content: dict[str, Any]) -> list[str]:
    """The keys of config.json that say something, and nothing that a model of this model_type is made of."""
    return config.ignored_keys(translated(content) if content["model_type"] in THEIRS else content)


def config_as(config_class: type[ViTConfig], config: ViTConfig) -> ViTConfig:
    """A config as one of another class: the encoder's keys, and defaults for the objective's."""
    if type(config) is config_class:
        return config
    shared = {item.name for item in fields(config)} & {item.name for item in fields(config_class)}
    return config_class(**{name: getattr(config, name) for name in shared - {"mask_ratio"}})
