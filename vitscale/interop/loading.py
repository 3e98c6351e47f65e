"""Any model that a user names, whoever saved it: opened as it is, or its weights in a model of any class and config,
where what fits is taken and the rest is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.errors import CheckpointError, ConfigError
from vitscale.files.model_folder import CONFIG, PROCESSOR, WEIGHT_FILES, read_json, stands_for_folder
from vitscale.files.sources import locate
from vitscale.interop.bare import KEYS, read_bare
from vitscale.interop.channels import adapt_channels
from vitscale.interop.config_files import config_as, read_config
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.keymaps import places
from vitscale.interop.pretrained import ENCODER, SavedModel, prefix_of, processor_dict, read_model, strict_model
from vitscale.interop.strict import refuse
from vitscale.interop.their_configs import ANTIALIASED, ANY_SIZE
from vitscale.interop.timm import is_timm, read_timm
from vitscale.interop.vision_transformer import Opened
from vitscale.models.auto import initialize
from vitscale.models.configuration import ViTConfig
from vitscale.models.positions import fixed_positions, interpolate_positions
from vitscale.models.simmim import MaskedImageModel
from vitscale.models.vit import ViTModel, ViTPreTrainedModel
from vitscale.text import listed, to_stderr

HEAD_SEED = 0  # what a fresh head is drawn from, so that it is the same each time
_PROJECTION = f"{ENCODER}embeddings.patch_embeddings.projection.weight"
_POSITIONS = (f"{ENCODER}embeddings.position_embeddings", "decoder.decoder_pos_embed")
# Of the encoder, what only some classes have.
_OPTIONAL = ("embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias")


@dataclass(frozen=True)
class LoadReport:
    """What of a model did not come from a folder as it lay there, and what of the folder was not used.

    Names are parameters of the model, in `unused` of the folder's tensors.
    """

    fresh: list[str] = field(default_factory=list)  # new values, to be trained
    unused: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)  # those of `fresh` whose shape in the folder is another
    adapted: list[str] = field(default_factory=list)  # made from the folder's: other channels, another image size

    def lines(self) -> list[str]:
        """For the terminal: nothing where all was used as it is."""
        parts = []
        if self.fresh:
            other = f" (of another shape: {listed(self.mismatched)})" if self.mismatched else ""
            parts.append(f"new, to be trained: {listed(self.fresh)}{other}")
        if self.adapted:
            parts.append(f"adapted: {listed(self.adapted)}")
        return [*(["; ".join(parts)] if parts else []), *([f"not used: {listed(self.unused)}"] if self.unused else [])]


def open_model(
    source: str | Path, options: Mapping[str, Any] | None = None, take: str | None = None, **where: Any
) -> Opened:
    """The model at `source`: a folder of ours, of transformers or of timm, a run's folder, a name on the hub, or a
    file of weights.

    options: what a file of weights leaves open (bare.KEYS); take: which of its sets of weights; where: options of
    `locate`. CheckpointError and ConfigError name what cannot be read, and what to do.
    """
    path = _find(source, **where)
    if options and path.is_dir():
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ConfigError(f"{given}: is for a bare file of weights, and {source} says its own; leave it out")
    if (opened := _by_tensors(path, options or {}, take)) is not None:
        return opened
    saved = read_model(path, take=take)
    model, notes = strict_model(saved), list(saved.notes)
    tensors = sum(len(each.names) for each in places(saved.state))
    if (path / PROCESSOR).is_file():
        processor = ViTImageProcessor.from_pretrained(path)
        return Opened("hf", model, processor, tensors, notes, saved.model_type in ANY_SIZE)
    processor = ViTImageProcessor.from_dict(processor_dict(model.config, (0.5,), (0.5,)))
    notes.append(f"it has no {PROCESSOR}: images are taken to be resized and normalized by 0.5 and 0.5")
    return Opened("hf", model, processor, tensors, notes)


def open_by_tensors(
    source: str | Path, defaults: Mapping[str, Any], take: str | None = None, **where: Any
) -> Opened | None:
    """The model of a file of weights or a folder of timm, whose config and processor follow from its tensors; None for
    a folder of ours or of transformers.

    defaults: see `read_source`.
    """
    path = _find(source, **where, only=CONFIG)
    follows = path.is_file() or is_timm(read_json(path / CONFIG))
    return _by_tensors(_find(source, **where), {}, take, defaults) if follows else None


def config_of(source: str | Path, overrides: Mapping[str, Any], take: str | None = None, **where: Any) -> ViTConfig:
    """The config of whatever `open_model` takes, without its weights where they are not needed.

    overrides: what a caller will lay over it; says what a file of weights leaves open.
    """
    opened = open_by_tensors(source, keys_for_files(None, overrides), take, **where)
    return read_config(locate(source, only=CONFIG, **where) / CONFIG) if opened is None else opened.model.config


def read_source(
    source: str | Path,
    default: type[ViTPreTrainedModel],
    defaults: Mapping[str, Any],
    take: str | None = None,
    **where: Any,
) -> SavedModel:
    """The state at `source`, as `open_model` finds it, for a model of any class.

    default: the class of a folder whose config.json names none of ours; defaults: what the caller's model has of what
    a file of weights leaves open.
    """
    path = _find(source, **where)
    opened = _by_tensors(path, {}, take, defaults)
    if opened is None:
        return read_model(path, default, take)
    model = opened.model
    state = {**model.state_dict(), **fixed_positions(model)}
    return SavedModel(path, type(model), model.config, state, [], opened.notes)


def _find(source: str | Path, **where: Any) -> Path:
    """A file of weights by itself, or the folder of a model."""
    path = Path(source).expanduser()
    if path.suffix in WEIGHT_FILES and not path.exists():
        raise CheckpointError(f"{source}: no such file; name a file of weights, a model's folder or a name on the hub")
    return path if path.is_file() and not stands_for_folder(path) else locate(source, **where)


def _by_tensors(
    path: Path, options: Mapping[str, Any], take: str | None, defaults: Mapping[str, Any] | None = None
) -> Opened | None:
    """The model of a file of weights or a folder of timm; None for another folder."""
    if path.is_file():
        return read_bare(path, options, take, defaults)
    return read_timm(path, take) if is_timm(read_json(path / CONFIG)) else None


def load_pretrained(
    model_class: type[ViTPreTrainedModel],
    source: str | Path,
    *,
    config: ViTConfig | None,
    dtype: str | torch.dtype | None,
    ignore_mismatched_sizes: bool,
    take: str | None,
    overrides: dict[str, Any],
    **where: Any,
) -> tuple[ViTPreTrainedModel, LoadReport]:
    """PretrainedMixin.from_pretrained; `where`: options of `locate`. What the report names is said on stderr."""
    options = {name: overrides.pop(name) for name in ("add_pooling_layer", "use_mask_token") if name in overrides}
    if options and not issubclass(model_class, ViTModel):
        raise ConfigError(f"{', '.join(options)}: is for ViTModel, and this is {model_class.__name__}; leave it out")
    saved = read_source(source, model_class, keys_for_files(config, overrides), take, **where)
    target = _config(model_class, saved, config, overrides)
    tensors = _from_encoder(saved)
    if issubclass(model_class, ViTModel):
        options.setdefault("add_pooling_layer", f"{ENCODER}pooler.dense.weight" in tensors)
        options.setdefault("use_mask_token", f"{ENCODER}embeddings.mask_token" in tensors)
    with torch.device("meta"):
        model = model_class(target, **options)
    values, report = _matched(model, tensors, saved, str(source))
    if report.mismatched and not ignore_mismatched_sizes:
        raise CheckpointError(_head_mismatch(str(source), saved.config, target, report.mismatched))
    initialize(model, HEAD_SEED, only=report.fresh)
    _fill(model, values)
    to_stderr(*(f"{source}: {note}" for note in saved.notes))
    to_stderr(*(f"{source}, as a {model_class.__name__}: {line}" for line in report.lines()))
    saved_dtype = next(iter(saved.state.values())).dtype
    return model.to(_dtype(dtype, saved_dtype)).eval(), report


def start_from(
    model: ViTPreTrainedModel, source: str | Path, adapt: bool = False, take: str | None = None
) -> LoadReport:
    """Let a new model of any objective start from the weights of whatever `open_model` takes.

    The encoder must be in it whole, of the same shape and grid (else CheckpointError, and the
    model is as it was); a head, decoder or mask token is taken where name and shape agree. adapt: positions and patch
    projection are made to fit another image size and other channels, as from_pretrained does.
    """
    saved = read_source(source, type(model), keys_for_files(model.config, {}), take)
    to_stderr(*(f"{source}: {note}" for note in saved.notes))
    values, report = _matched(model, _from_encoder(saved), saved, str(source), adapt)
    if not adapt and (grids := _grids(saved.config, model.config, "instead of")):
        other = [f"{name} {grids}" for name in _POSITIONS if name in values]
        refuse(str(source), other=other, hint=_differing(saved.config, model.config))
    _fill(model, values)
    return report


def keys_for_files(config: ViTConfig | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a bare file of weights may leave open, what a config or its overrides have.

    Not image_size among overrides, which asks for positions of another size.
    """
    values = {} if config is None else {name: getattr(config, name) for name in KEYS if hasattr(config, name)}
    return values | {name: overrides[name] for name in KEYS if name in overrides and name != "image_size"}


def _from_encoder(saved: SavedModel) -> dict[str, Tensor]:
    """The state by the names that it has in a model with a head."""
    prefix = ENCODER if issubclass(saved.model_class, ViTModel) else ""
    return {prefix + name: tensor for name, tensor in saved.state.items()}


def _config(
    model_class: type[ViTPreTrainedModel], saved: SavedModel, config: ViTConfig | None, overrides: dict[str, Any]
) -> ViTConfig:
    target = config_as(model_class.config_class, saved.config if config is None else config)
    new_decoder = issubclass(model_class, MaskedImageModel) and not issubclass(saved.model_class, MaskedImageModel)
    if new_decoder and config is None:  # then no weights depend on the old stride
        overrides = {"encoder_stride": overrides.get("patch_size", target.patch_size)} | overrides
    return target.overridden(overrides)


@torch.no_grad()
def _matched(
    model: ViTPreTrainedModel, tensors: dict[str, Tensor], saved: SavedModel, source: str, adapt: bool = True
) -> tuple[dict[str, Tensor], LoadReport]:
    """What each parameter of the model gets of `tensors`; CheckpointError where the encoder is not there whole."""
    prefix = prefix_of(model)
    values: dict[str, Tensor] = {}
    missing: list[str] = []
    fresh: list[str] = []
    adapted: list[str] = []
    other: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        full = prefix + name
        value = tensors.get(full)
        if value is None:
            optional = not full.startswith(ENCODER) or full.removeprefix(ENCODER) in _OPTIONAL
            (fresh if optional else missing).append(name)
            continue
        fitted, how = _adapted(full, value, saved, model.config) if adapt else (None, "")
        if fitted is not None and fitted.shape == parameter.shape:
            adapted.append(f"{name} {how}")
            value = fitted
        if value.shape == parameter.shape:
            values[name] = value
        else:
            other[name] = f"{name} {list(value.shape)} instead of {list(parameter.shape)}"
    head = sorted(name for name in other if not (prefix + name).startswith(ENCODER))
    of_encoder = [text for name, text in other.items() if name not in head]
    refuse(source, missing=missing, other=of_encoder, hint=_differing(saved.config, model.config))
    unused = tensors.keys() - {prefix + name for name in values}
    if saved.config.position_embeddings == "sincos":  # computed, wherever there are any
        unused -= {prefix + name for name in fixed_positions(model)}
    mismatched = [other[name] for name in head]
    return values, LoadReport(sorted(fresh + head), sorted(unused) + saved.unused, mismatched, adapted)


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)


def _adapted(name: str, value: Tensor, saved: SavedModel, target: ViTConfig) -> tuple[Tensor | None, str]:
    """A tensor of the folder for other channels or another grid, and how; None where no rule asks for it."""
    config = saved.config
    if name == _PROJECTION and value.ndim == 4 and config.num_channels != target.num_channels:
        return adapt_channels(value, target.num_channels), f"{config.num_channels} to {target.num_channels} channels"
    positions = name in _POSITIONS and value.ndim == 3 and value.shape[1] >= config.num_patches
    if positions and (how := _grids(config, target, "to")):
        return interpolate_positions(value, config.grid, target.grid, saved.model_type == ANTIALIASED), how
    return None, ""


def _grids(config: ViTConfig, target: ViTConfig, between: str) -> str:
    """What differs between two grids, which may have as many patches; "" where they are one."""
    (rows, columns), (new_rows, new_columns) = config.grid, target.grid
    return "" if config.grid == target.grid else f"{rows}x{columns} {between} {new_rows}x{new_columns} patches"


def _differing(config: ViTConfig, target: ViTConfig) -> str:
    names = [item.name for item in fields(config) if hasattr(target, item.name)]
    pairs = {name: (getattr(config, name), getattr(target, name)) for name in names}
    different = [f"{name}={value!r}, not {other!r}" for name, (value, other) in pairs.items() if value != other]
    return f"its config has {', '.join(different[:4])}: ask for the same" if different else ""


def _head_mismatch(source: str, config: ViTConfig, target: ViTConfig, other: list[str]) -> str:
    hint = "pass ignore_mismatched_sizes=True for a new head, to be trained"
    if config.num_labels != target.num_labels:
        return (
            f"{source}: its classifier has num_labels={config.num_labels}, and {target.num_labels} are asked for: "
            f"{hint}, or leave num_labels and id2label out"
        )
    return f"{source}: tensors of another shape: {listed(other)}; {hint}, or leave out what changes them"


def _dtype(requested: str | torch.dtype | None, saved: torch.dtype) -> torch.dtype:
    """None: float32; "auto": as in the folder; else torch's, or its name."""
    if requested is None or requested == "auto":
        return torch.float32 if requested is None else saved
    dtype = getattr(torch, requested, None) if isinstance(requested, str) else requested
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype={requested!r}: must be None (float32), auto (the folder's) or a floating dtype")
    return dtype
