"""config.json -> a config of ours, and back; and configs made from others."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import vitscale
from vitscale.errors import CheckpointError, ConfigError
from vitscale.files.atomic import write_atomically
from vitscale.interop.sources import CONFIG, locate
from vitscale.models.configuration import ViTConfig
from vitscale.models.mae import ViTMAEConfig
from vitscale.text import did_you_mean

CONFIGS: dict[str, type[ViTConfig]] = {each.model_type: each for each in (ViTConfig, ViTMAEConfig)}
MODEL_TYPES = tuple(prefix + name for prefix in ("", "vitscale_") for name in CONFIGS)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping. CheckpointError where it is missing or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model's folder holds config.json and its weights") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a mapping")
    return content


def as_text(content: dict[str, Any]) -> str:
    """JSON as it stands in a model's folder."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping as JSON. CheckpointError where that cannot be."""
    try:
        write_atomically(path, as_text(content))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}; name another folder") from None


def architecture(path: Path, content: dict[str, Any]) -> str:
    """The class that config.json says the model is of, "" where it says none. CheckpointError for anything else."""
    named = content.get("architectures") or [""]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{path}: architectures={named!r}: must be a list with a class's name, or left out")
    return named[0]


def read_config(path: Path, content: dict[str, Any] | None = None) -> ViTConfig:
    """The config in a file, of the class that its model_type tells.

    content: what is in it, if it has been read. CheckpointError if model_type is not one of ours, or a value is none
    that our ViT can have.
    """
    content = read_json(path) if content is None else content
    kind = content.get("model_type")
    if kind not in MODEL_TYPES:
        timm = "; this is timm's config: `vitscale convert` reads such folders" if "architecture" in content else ""
        raise CheckpointError(f"{path}: model_type={kind!r}: must be one of {', '.join(MODEL_TYPES)}{timm}")
    try:
        return CONFIGS[kind.removeprefix("vitscale_")].from_dict(content)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def config_content(config: ViTConfig) -> dict[str, Any]:
    """What config.json says of a config."""
    return {**config.to_dict(), "vitscale_version": vitscale.__version__}


def config_as(config_class: type[ViTConfig], config: ViTConfig) -> ViTConfig:
    """A config as one of another class: the encoder's keys, and defaults for the objective's."""
    if type(config) is config_class:
        return config
    shared = {item.name for item in fields(config)} & {item.name for item in fields(config_class)}
    return config_class(**{name: getattr(config, name) for name in shared - {"mask_ratio"}})


def overridden(config: ViTConfig, overrides: dict[str, Any]) -> ViTConfig:
    """A config with other values for some keys; the labels' names go where their number is another one.

    ConfigError for a key that there is not, naming the nearest.
    """
    keys = {item.name: getattr(config, item.name) for item in fields(config)}
    for name in overrides:
        if name not in keys:
            near = did_you_mean(name.removeprefix("torch_"), [*keys, "dtype", "token", "revision"])
            raise ConfigError(f"{name}={overrides[name]!r}: {type(config).__name__} has no such key{near}")
    names, count = overrides.get("id2label"), overrides.get("num_labels")
    if isinstance(names, dict) and count not in (None, len(names)):
        raise ConfigError(f"num_labels={count}: must be {len(names)}, the number of names in id2label; leave it out")
    if names is not None or overrides.get("label2id") is not None or count not in (None, config.num_labels):
        keys |= {"id2label": None, "label2id": None}
    return type(config)(**keys | overrides)


def load_config(config_class: type[Any], source: str | Path, overrides: dict[str, Any], **where: Any) -> Any:
    """PretrainedConfigMixin.from_pretrained; `where`: options of `locate`."""
    config = read_config(locate(source, only=CONFIG, **where) / CONFIG)
    return overridden(config_as(config_class, config), overrides)


def save_config(config: ViTConfig, folder: str | Path) -> None:
    """Write config.json. CheckpointError where the folder cannot be written."""
    write_json(Path(folder) / CONFIG, config_content(config))
