"""A config as it is planned: without its data, and of the encoder that fine-tuning starts from only the size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from vitscale.config.check import has_validation
from vitscale.config.load import Flat, load_config
from vitscale.config.presets import PRESET_KEYS
from vitscale.config.schema import RunConfig, Source
from vitscale.errors import ConfigError, VitscaleError

SizesOfEncoder = Callable[[Flat], Flat]  # the keys that a config's model.init_from gives, from those that are written


def planned_config(path: str, overrides: Iterable[str], sizes_of_encoder: SizesOfEncoder) -> RunConfig:
    """The config of `vitscale pretrain`, or of `finetune` where a classifier starts from model.init_from."""
    config = load_config(path, overrides, partial(_with_encoder, sizes_of_encoder))
    if has_validation(config):
        return config
    not_named_yet = replace(config.data, validation=(Source("validation"),))  # what train.keep_best scores on
    return replace(config, data=not_named_yet)


def _with_encoder(sizes_of_encoder: SizesOfEncoder, written: Flat) -> Flat:
    source = written.get("model.init_from")
    if source is None or written.get("objective.name", "classification") != "classification":
        return {}
    keys: Flat = {"objective.name": "classification"}
    try:
        return keys | sizes_of_encoder(written)
    except VitscaleError as error:
        if all(f"model.{name}" in written for name in PRESET_KEYS):
            return keys
        raise ConfigError(
            f"model.init_from={source}: the model's size comes from there, and cannot be read ({error}); add it, say "
            "model.preset=H"
        ) from None
