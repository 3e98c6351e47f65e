"""A trained model as a folder that transformers opens, and such a folder as our module.

config.json, the weights and preprocessor_config.json, by transformers' names (keymaps.py). Nothing
here needs the GPU, the ranks or the process group that trained. loading.py fits a folder's weights
to other classes and configs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitscale.config.check import has_validation
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig
from vitscale.errors import CheckpointError
from vitscale.files.model_folder import CONFIG, PROCESSOR, as_text, read_json
from vitscale.interop.checkpoints import unwrap
from vitscale.interop.config_files import architecture, config_as, ignored_keys, read_config
from vitscale.interop.dialects import vit_names
from vitscale.interop.image_processing import ViTImageProcessor, processor_for
from vitscale.interop.keymaps import canonical, places
from vitscale.interop.strict import refuse, require_equal, shapes
from vitscale.interop.their_configs import THEIRS
from vitscale.interop.weight_files import MAX_SHARD_SIZE, read_weights, write_folder
from vitscale.models.auto import CLASSES, OBJECTIVES, vit_config
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.positions import fill_fixed_positions, fixed_positions, is_table
from vitscale.models.vit import ViTModel, ViTPreTrainedModel
from vitscale.text import listed, to_stderr

ENCODER = "vit."
State = Mapping[str, Tensor | np.ndarray]
# transformers' encoder of an MAE is a ViTModel without a pooler, but that it hides patches.
_ENCODERS = {"ViTMAEModel": ViTModel.__name__}


@dataclass(frozen=True)
class SavedModel:
    """What a folder holds: the state by our names, fixed position tables included."""

    folder: Path
    model_class: type[ViTPreTrainedModel]
    config: ViTConfig
    state: dict[str, Tensor]
    unused: list[str]  # names on disk that no model of this class has
    notes: list[str] = field(default_factory=list)  # what was taken off, chosen or assumed
    model_type: str = ""  # as config.json has it


def save_run_model(folder: str | Path, config: RunConfig, state: State) -> None:
    """`save_model` for the model of a run."""
    name = OBJECTIVES[config.objective.name].__name__
    crop = config.evaluation.crop_fraction if has_validation(config) else None  # as its scores were measured
    save_model(folder, name, vit_config(config), state, config.augment.mean, config.augment.std, crop=crop)


def save_model(
    folder: str | Path,
    class_name: str,
    config: ViTConfig,
    state: State,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    crop: float | None = None,
) -> None:
    """Write a model's folder.

    `state`: the model's `state_dict()` or its named parameters, tensors or arrays by our names;
    `image_mean`, `image_std`: what pixels in [0, 1] were normalized by, one number or one a channel; crop: see
    processor_dict. Raises CheckpointError where names or shapes are not those of the model.
    """
    model = skeleton(CLASSES[class_name], config, state)
    tensors = {name: torch.as_tensor(value).detach().cpu() for name, value in state.items()}
    require_equal(shapes(model.state_dict()), shapes(tensors), f"the state of {class_name}")
    processor = processor_dict(config, image_mean, image_std, crop)
    _write_model(folder, class_name, config, tensors | fixed_positions(model), processor)


def processor_dict(
    config: ViTConfig, image_mean: Sequence[float], image_std: Sequence[float], crop: float | None = None
) -> dict[str, Any]:
    """preprocessor_config.json for a model: bicubic to the model's size, [0, 1], normalized.

    image_mean, image_std: one number, or one a channel. crop: the side of a centre crop as a share of the shorter side,
    for square images; None: all of the image is squeezed to the size.
    """
    height, width = pair(config.image_size)
    size = {"shortest_edge": round(height / crop)} if crop and height == width else None
    return processor_for(config, image_mean, image_std, size).to_dict()


def save_pretrained(
    model: ViTPreTrainedModel,
    folder: str | Path,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    processor: ViTImageProcessor | None = None,
) -> None:
    """Write a model's config and weights, as transformers does, and its processor where one is given."""
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()} | fixed_positions(model)
    content = None if processor is None else processor.to_dict()
    _write_model(folder, type(model).__name__, model.config, tensors, content, max_shard_size)


def _write_model(
    folder: str | Path,
    class_name: str,
    config: ViTConfig,
    tensors: Mapping[str, Tensor],
    processor: dict[str, Any] | None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write config, tensors (all that the class has, by our names) and the content of preprocessor_config.json."""
    on_disk: dict[str, Tensor] = {}
    for ours, names in places(tensors):
        parts = tensors[ours].chunk(len(names))
        on_disk |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    content = {"architectures": [class_name], **config.content(), "dtype": dtype}
    texts = {CONFIG: as_text(content)} | ({} if processor is None else {PROCESSOR: as_text(processor)})
    write_folder(Path(folder), texts, on_disk, max_shard_size)


def prefix_of(model: nn.Module) -> str:
    """What goes before an encoder's names to make them those of a model with a head."""
    return ENCODER if isinstance(model, ViTModel) else ""


def load_model(folder: str | Path) -> ViTPreTrainedModel:
    """The model of a folder that we or transformers saved, in float32 on the CPU, in evaluation mode.

    Strict: CheckpointError names missing and unexpected tensors, or other shapes. What wrappers were taken off is
    printed on stderr.
    """
    saved = read_model(folder)
    to_stderr(*(f"{folder}: {note}" for note in saved.notes))
    return strict_model(saved)


def filled(model: ViTPreTrainedModel, state: Mapping[str, Tensor], where: str) -> ViTPreTrainedModel:
    """A model without memory with this state, on the CPU, in evaluation mode; CheckpointError if it is another's."""
    model.to_empty(device="cpu")
    require_equal(shapes(model.state_dict()), shapes(state), where)
    model.load_state_dict(state)
    fill_fixed_positions(model)
    return model.eval()


def strict_model(saved: SavedModel) -> ViTPreTrainedModel:
    """The model of what was read, in float32 on the CPU, in evaluation mode; CheckpointError as `load_model`."""
    where = str(saved.folder)
    refuse(where, unexpected=saved.unused)
    model = skeleton(saved.model_class, saved.config, saved.state)
    fixed = fixed_positions(model)
    return filled(model, {name: tensor for name, tensor in saved.state.items() if name not in fixed}, where)


def read_model(
    folder: str | Path, default: type[ViTPreTrainedModel] | None = None, take: str | None = None
) -> SavedModel:
    """Read a folder that `save_model` or transformers' save_pretrained wrote.

    default: the class of a folder whose config.json names none of ours; take: see checkpoints.unwrap. CheckpointError
    if a file is missing, broken, or of a model that is not ours, or a tensor is missing; extra ones are in `unused`.
    """
    folder = Path(folder)
    content = read_json(folder / CONFIG)
    config, named = read_config(folder / CONFIG, content), architecture(folder / CONFIG, content)
    checkpoint = unwrap(read_weights(folder), str(folder), take)
    weights, notes = checkpoint.tensors, list(checkpoint.notes)
    bare = default and not any(canonical(name).startswith("vit.") for name in weights)
    model_class = CLASSES.get(_ENCODERS.get(named, named), ViTModel if bare else default)
    if content["model_type"] in THEIRS:
        model_class, weights, left = _of_theirs(config, weights)
        notes += left
    if model_class is None:
        raise CheckpointError(
            f"{folder / CONFIG}: architectures names {named or 'no class'}: must be one of {', '.join(CLASSES)}"
        )
    if ignored := ignored_keys(config, content):
        notes.append(f"{CONFIG}: passed over, no keys of a {content['model_type']}: {listed(ignored)}")
    config = config_as(model_class.config_class, config)
    state, unused = _assemble(model_class, config, weights, folder)
    notes += _settle_positions(model_class, config, content, state, folder)
    return SavedModel(folder, model_class, config, state, unused, notes, content["model_type"])


def _of_theirs(
    config: ViTConfig, weights: dict[str, Tensor]
) -> tuple[type[ViTPreTrainedModel], dict[str, Tensor], list[str]]:
    """The class that is another ViT of transformers here, its tensors by that class's names, and what was left out."""
    weights, notes = vit_names(weights)
    pooler = [] if config.use_cls_token else [name for name in weights if name.startswith("vit.pooler.")]
    if pooler:
        notes.append(f"not used, a pooler of the first patch, where ours takes their mean: {listed(pooler)}")
    weights = {name: tensor for name, tensor in weights.items() if name not in pooler}
    if "classifier.weight" in weights:
        return ViTForImageClassification, weights, notes
    return ViTModel, {name.removeprefix(ENCODER): tensor for name, tensor in weights.items()}, notes


def skeleton(model_class: type[ViTPreTrainedModel], config: ViTConfig, names: Iterable[str]) -> ViTPreTrainedModel:
    """The module without memory; a bare ViTModel has the pooler and the mask token that `names` tell of."""
    with torch.device("meta"):
        if issubclass(model_class, ViTModel):
            seen = set(names)
            return model_class(config, "pooler.dense.weight" in seen, "embeddings.mask_token" in seen)
        return model_class(config)


def _assemble(
    model_class: type[ViTPreTrainedModel], config: ViTConfig, on_disk: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a folder under our names, and the names of those that no such model has."""
    named = {canonical(name): name for name in on_disk}
    if len(named) < len(on_disk):
        twice = on_disk.keys() - named.values()
        raise CheckpointError(f"{folder}: tensors twice, by two of their names: {', '.join(sorted(twice))}")
    model = skeleton(model_class, config, named)
    expected = places([*model.state_dict(), *fixed_positions(model)])
    names = {name for place in expected for name in place.names}
    refuse(str(folder), missing=[name for name in names if name not in named])
    state = {place.ours: _joined({name: on_disk[named[name]] for name in place.names}, folder) for place in expected}
    return state, sorted(named.keys() - names)


def _joined(parts: dict[str, Tensor], folder: Path) -> Tensor:
    """A tensor from its rows on disk. CheckpointError where one part has another shape than the others."""
    tensors = list(parts.values())
    if len(tensors) == 1:
        return tensors[0]
    if len({tensor.shape for tensor in tensors}) > 1 or tensors[0].ndim == 0:
        names = ", ".join(f"{name} {list(shape)}" for name, shape in shapes(parts).items())
        raise CheckpointError(f"{folder}: tensors {names}: must be of one shape, being rows of one; save them again")
    return torch.cat(tensors)


def _settle_positions(
    model_class: type[ViTPreTrainedModel],
    config: ViTConfig,
    content: dict[str, Any],
    state: dict[str, Tensor],
    folder: Path,
) -> list[str]:
    """Set config.position_embeddings to what the file's positions are, and note it if config.json says otherwise.

    transformers writes MAE's fixed table like any parameter and does not say which it is, so there the table itself
    tells. It also trains positions that were fixed, and keeps our key; in a file of ours that is an error.
    """
    if config.position_embeddings != "sincos":
        return []
    for name, table in fixed_positions(skeleton(model_class, config, state)).items():
        if is_table(state[name], table):
            continue
        config.position_embeddings = "learned"
        if "position_embeddings" not in content:
            return []
        if "transformers_version" in content:
            return [f"{CONFIG}: position_embeddings=sincos, and transformers has trained them: learned"]
        raise CheckpointError(f"{folder}: {name} is not the sincos table that position_embeddings promises")
    return []
