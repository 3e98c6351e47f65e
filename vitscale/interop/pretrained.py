"""A trained model as a folder that transformers opens, and such a folder as our module.

config.json, model.safetensors and preprocessor_config.json, by transformers' names (keymaps.py).
Nothing here needs the GPU, the ranks or the process group that trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitscale
from vitscale.config.check import pair
from vitscale.config.schema import RunConfig
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.keymaps import canonical, places
from vitscale.models.auto import CLASSES, OBJECTIVES, vit_config
from vitscale.models.configuration import ViTConfig
from vitscale.models.positions import fill_fixed_positions, fixed_positions
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"

State = Mapping[str, Tensor | np.ndarray]


@dataclass(frozen=True)
class SavedModel:
    """What a folder holds: the state by our names, fixed position tables included."""

    class_name: str
    config: ViTConfig
    state: dict[str, Tensor]


class StartReport(NamedTuple):
    """What `start_from` left as it was in the model, and what of the folder it did not use."""

    fresh: list[str]
    unused: list[str]


def save_run_model(folder: str | Path, config: RunConfig, state: State) -> None:
    """`save_model` for the model of a run."""
    name = OBJECTIVES[config.objective.name].__name__
    save_model(folder, name, vit_config(config), state, config.augment.mean, config.augment.std)


def save_model(
    folder: str | Path,
    class_name: str,
    config: ViTConfig,
    state: State,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> None:
    """Write a model's folder.

    `state`: the model's `state_dict()` or its named parameters, tensors or arrays by our names;
    `image_mean`, `image_std`: what pixels in [0, 1] were normalized by, one number or one a channel.
    Raises CheckpointError where names or shapes are not those of the model.
    """
    model = _skeleton(class_name, config, state)
    tensors = {name: torch.as_tensor(value).detach().cpu() for name, value in state.items()}
    _require(_shapes(model.state_dict()), _shapes(tensors), f"the state of {class_name}")
    tensors |= fixed_positions(model)

    on_disk: dict[str, Tensor] = {}
    for ours, theirs in places(tensors):
        parts = tensors[ours].chunk(len(theirs))
        on_disk |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    content = {"architectures": [class_name], **config.to_dict(), "dtype": dtype, "vitscale_version": _version()}

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made: {error.strerror}; name another folder") from None
    # Each file appears whole; the weights come last, so that a folder with weights is complete.
    _write_json(folder / CONFIG, content)
    _write_json(folder / PROCESSOR, _processor(config, image_mean, image_std))
    partial = folder / f".{WEIGHTS}.tmp"
    save_file(on_disk, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)


def load_model(folder: str | Path) -> ViTPreTrainedModel:
    """The model of a folder that we or transformers saved, in float32 on the CPU, in evaluation mode.

    Strict: raises CheckpointError that names missing and unexpected tensors, or other shapes.
    """
    saved = read_model(folder)
    model = _skeleton(saved.class_name, saved.config, saved.state)
    model.to_empty(device="cpu")
    fixed = fixed_positions(model)
    state = {name: tensor for name, tensor in saved.state.items() if name not in fixed}
    _require(_shapes(model.state_dict()), _shapes(state), str(Path(folder) / WEIGHTS))
    model.load_state_dict(state)
    fill_fixed_positions(model)
    return model.eval()


@torch.no_grad()
def start_from(model: ViTPreTrainedModel, folder: str | Path) -> StartReport:
    """Let a new model of any objective start from a folder's weights.

    The encoder must be in the folder whole and of the same shape (else CheckpointError, and the
    model is as it was); a head, decoder or mask token is taken where name and shape agree.
    """
    saved = read_model(folder)
    prefix = "vit." if saved.class_name == ViTModel.__name__ else ""
    found = {prefix + name: tensor for name, tensor in saved.state.items()}
    parameters = dict(model.named_parameters())
    taken = {name for name, value in parameters.items() if name in found and found[name].shape == value.shape}
    encoder = {name: value for name, value in parameters.items() if name.startswith("vit.")}
    encoder.pop("vit.embeddings.mask_token", None)
    _require(_shapes(encoder), _shapes({name: found[name] for name in encoder if name in found}), str(folder))
    for name in taken:
        parameters[name].copy_(found[name])
    unused = found.keys() - taken
    if saved.config.position_embeddings == "sincos":
        unused -= fixed_positions(model).keys()
    return StartReport(sorted(parameters.keys() - taken), sorted(unused))


def read_model(folder: str | Path) -> SavedModel:
    """Read a folder that `save_model` or transformers' save_pretrained wrote.

    Raises CheckpointError where a file is missing, broken, or of a model that is not ours.
    """
    folder = Path(folder)
    content = _read_json(folder / CONFIG)
    class_name = (content.get("architectures") or [None])[0]
    if class_name not in CLASSES:
        raise CheckpointError(
            f"{folder / CONFIG}: architectures={content.get('architectures')}: must name one of {', '.join(CLASSES)}"
        )
    on_disk = _read_weights(folder)
    try:
        config = CLASSES[class_name].config_class.from_dict(content)
        state = _assemble(class_name, config, on_disk, str(folder / WEIGHTS))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    _settle_positions(class_name, config, content, state, str(folder / WEIGHTS))
    return SavedModel(class_name, config, state)


def _skeleton(class_name: str, config: ViTConfig, names: Iterable[str]) -> ViTPreTrainedModel:
    """The module without memory; a bare ViTModel has the pooler and the mask token that `names` tell of."""
    with torch.device("meta"):
        if class_name == ViTModel.__name__:
            seen = set(names)
            return ViTModel(config, "pooler.dense.weight" in seen, "embeddings.mask_token" in seen)
        return CLASSES[class_name](config)


def _assemble(class_name: str, config: ViTConfig, on_disk: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a file under our names; every one of them is used or named in an error."""
    model = _skeleton(class_name, config, on_disk)
    wanted = places([*model.state_dict(), *fixed_positions(model)])
    missing = [name for _, theirs in wanted for name in theirs if name not in on_disk]
    unexpected = on_disk.keys() - {name for _, theirs in wanted for name in theirs}
    _refuse(missing, unexpected, [], where)
    return {ours: torch.cat([on_disk[name] for name in theirs]) for ours, theirs in wanted}


def _settle_positions(
    class_name: str, config: ViTConfig, content: dict[str, Any], state: dict[str, Tensor], where: str
) -> None:
    """Set config.position_embeddings to what the file's positions are.

    transformers writes MAE's fixed table like any parameter and does not say which it is, so there
    the table itself tells; where the config says sincos, another table is an error.
    """
    if config.position_embeddings != "sincos":
        return
    for name, table in fixed_positions(_skeleton(class_name, config, state)).items():
        if state[name].shape == table.shape and torch.allclose(state[name].float(), table, atol=1e-5):
            continue
        if "position_embeddings" in content:
            raise CheckpointError(f"{where}: {name} is not the sincos table that position_embeddings promises")
        config.position_embeddings = "learned"
        return


def _require(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: str) -> None:
    other = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    _refuse(expected.keys() - found.keys(), found.keys() - expected.keys(), other, where)


def _refuse(missing: Iterable[str], unexpected: Iterable[str], other_shapes: Iterable[str], where: str) -> None:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other_shapes}
    parts = [f"{kind}: {_listed(sorted(names))}" for kind, names in kinds.items() if names]
    if parts:
        raise CheckpointError(f"{where}: tensors {'; '.join(parts)}")


def _listed(names: list[str], limit: int = 6) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _processor(config: ViTConfig, image_mean: Sequence[float], image_std: Sequence[float]) -> dict[str, Any]:
    """transformers' ViTImageProcessor for this model: bicubic to the model's size, [0, 1], normalized."""
    height, width = pair(config.image_size)
    channels = config.num_channels
    mean, std = (list(each) * channels if len(each) == 1 else list(each) for each in (image_mean, image_std))
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"image_mean={mean}, image_std={std}: need one number, or one for each of the {channels} channels"
        )
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_convert_rgb": channels == 3,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model's folder holds {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a mapping")
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return {canonical(name): tensor for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; weights must be one safetensors file of that name") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _version() -> str:
    return vitscale.__version__
