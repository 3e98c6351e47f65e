"""Any model that a user names, whoever saved it, as one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.bare import read_bare
from vitscale.interop.checkpoints import WEIGHT_FILES
from vitscale.interop.config_files import read_json
from vitscale.interop.image_processing import PROCESSOR, ViTImageProcessor, processor_dict
from vitscale.interop.keymaps import places
from vitscale.interop.pretrained import SavedModel, read_model, strict_model
from vitscale.interop.sources import CONFIG, locate
from vitscale.interop.timm import is_timm, read_timm
from vitscale.interop.vision_transformer import Opened
from vitscale.models.positions import fixed_positions
from vitscale.models.vit import ViTPreTrainedModel


def open_model(
    source: str | Path, options: Mapping[str, Any] | None = None, take: str | None = None, **where: Any
) -> Opened:
    """The model at `source`: a folder of ours, of transformers or of timm, a run's folder, a name on the hub, or a
    file of weights.

    options: what a file of weights leaves open (bare.KEYS); take: which of its sets of weights; where: options of
    `locate`. CheckpointError and ConfigError name what cannot be read, and what to do.
    """
    if (file := _bare_file(source)) is not None:
        return read_bare(file, options or {}, take)
    for name, value in (options or {}).items():
        raise ConfigError(f"{name}={value!r}: is for a bare file of weights, and {source} says its own; leave it out")
    folder = _folder(source, where)
    if is_timm(read_json(folder / CONFIG)):
        return read_timm(folder, take)
    saved = read_model(folder, take=take)
    model, notes = strict_model(saved), list(saved.notes)
    tensors = sum(len(each.names) for each in places(saved.state))
    if (folder / PROCESSOR).is_file():
        return Opened("hf", model, ViTImageProcessor.from_pretrained(folder), tensors, notes)
    processor = ViTImageProcessor.from_dict(processor_dict(model.config, (0.5,), (0.5,)))
    notes.append(f"it has no {PROCESSOR}: images are taken to be resized and normalized by 0.5 and 0.5")
    return Opened("hf", model, processor, tensors, notes)


def read_source(
    source: str | Path,
    default: type[ViTPreTrainedModel],
    usual: Mapping[str, Any],
    take: str | None = None,
    **where: Any,
) -> SavedModel:
    """The state at `source`, as `open_model` finds it, for a model of any class.

    default: the class of a folder whose config.json names none of ours; usual: what the caller's model has of what
    a file of weights leaves open.
    """
    if (file := _bare_file(source)) is not None:
        return _saved(file, read_bare(file, {}, take, usual))
    folder = _folder(source, where)
    if is_timm(read_json(folder / CONFIG)):
        return _saved(folder, read_timm(folder, take))
    return read_model(folder, default, take)


def _saved(path: Path, opened: Opened) -> SavedModel:
    model = opened.model
    state = {**model.state_dict(), **fixed_positions(model)}
    return SavedModel(path, type(model), model.config, state, [], opened.notes)


def _bare_file(source: str | Path) -> Path | None:
    """A file of weights that no config.json lies beside."""
    path = Path(source).expanduser()
    if path.suffix in WEIGHT_FILES and not path.exists():
        raise CheckpointError(f"{source}: no such file; name a file of weights, a model's folder or a name on the hub")
    if not path.is_file() or (path.suffix == ".safetensors" and path.with_name(CONFIG).is_file()):
        return None
    return path


def _folder(source: str | Path, where: Mapping[str, Any]) -> Path:
    path = Path(source).expanduser()
    return path.parent if path.is_file() else locate(source, **where)
