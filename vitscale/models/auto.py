"""A run's config -> its model, and the values that its parameters start from."""

from __future__ import annotations

from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from vitscale import rng
from vitscale.config.check import has_classes, mask_patch
from vitscale.config.model_rules import pair
from vitscale.config.schema import MAE, RunConfig
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import OPTIONS, ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.positions import fill_fixed_positions
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

OBJECTIVES: dict[str, type[ViTPreTrainedModel]] = {
    "mae": ViTMAEForPreTraining,
    "simmim": ViTForMaskedImageModeling,
    "classification": ViTForImageClassification,
    "multitask": ViTForMultitaskPreTraining,
}
CLASSES: dict[str, type[ViTPreTrainedModel]] = {
    "ViTModel": ViTModel,
    **{model_class.__name__: model_class for model_class in OBJECTIVES.values()},
}


# Keys that another start of a run may change. They are about how to train (what is hidden or dropped,
# how losses are weighed), about what no objective has (the pooler), or follow from other keys.
FREE_KEYS = frozenset({
    "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range",
    "mask_ratio", "mask_patch", "label_smoothing", "mim_weight", "classification_weight",
    "pooler_output_size", "pooler_act", "encoder_stride", "id2label", "label2id", "problem_type",
    "output_attentions", "output_hidden_states",
})  # fmt: skip


def vit_config(config: RunConfig) -> ViTConfig:
    """The ViTConfig of a run: its `model` section and its objective's keys."""
    model, objective = config.model, config.objective
    elsewhere = {"position_embeddings", "num_labels", "id2label", "problem_type", "fc_norm"}
    keys = _values(model, {item.name for item in fields(ViTConfig)} - elsewhere)
    keys["encoder_stride"] = pair(model.patch_size)[0]  # of SimMIM alone, see below
    if model.position_embeddings != "auto":  # else the config class knows
        keys["position_embeddings"] = model.position_embeddings
    if objective.name == "mae":
        return ViTMAEConfig(**keys, **_values(objective.mae))
    if objective.needs_labels:
        names = None if model.id2label is None else dict(enumerate(model.id2label))
        keys |= {"num_labels": model.num_labels, "id2label": names, "problem_type": model.problem_type}
        keys["label_smoothing"] = objective.classification.label_smoothing
    if objective.name in ("simmim", "multitask"):
        keys |= {**_values(objective.simmim), "mask_patch": mask_patch(config), "encoder_stride": model.patch_size}
    if objective.name == "classification":
        keys["fc_norm"] = model.fc_norm
        if has_classes(config):  # said, since mixed labels in floating point would be told to be of many classes
            keys["problem_type"] = "single_label_classification"
    if objective.name == "multitask":
        keys |= _values(objective.multitask)
    return ViTConfig(**keys)


def model_keys(config: RunConfig) -> dict[str, Any]:
    """What the weights of a run depend on: {dotted config key: value as JSON has it}.

    The objective's name and every key of its `vit_config` but FREE_KEYS, with the value that it came
    to (`position_embeddings` is learned, sincos or none, sizes are those of the preset; a size that is
    no square is a list); an option of OPTIONS only where it is on. Between two starts of a run these
    must be equal: with another value the tensors have other shapes, or the same numbers mean something
    else.
    """
    left_out = FREE_KEYS if config.objective.needs_labels else FREE_KEYS | {"num_labels"}
    of_mae = {item.name for item in fields(MAE)}
    described: dict[str, Any] = {"objective.name": config.objective.name}
    of_run = vit_config(config)
    off = {name for name, usual in OPTIONS.items() if getattr(of_run, name) == usual}
    for name, value in _values(of_run).items():
        if name not in left_out | off:
            section = "objective.mae" if name in of_mae else "model"
            described[f"{section}.{name}"] = list(value) if isinstance(value, tuple) else value
    return described


def _values(section: Any, names: Container[str] | None = None) -> dict[str, Any]:
    """The keys of a config section (those of `names`) and their values."""
    own = [item.name for item in fields(section) if names is None or item.name in names]
    return {name: getattr(section, name) for name in own}


def build_model(config: RunConfig) -> ViTPreTrainedModel:
    """The model of a run, its parameters not yet of any use: `initialize` or load them.

    Under `torch.device("meta")` it takes no memory; `initialize` then makes it.
    """
    return OBJECTIVES[config.objective.name](vit_config(config))


def new_model(config: RunConfig, seed: int, drawn: bool = True) -> ViTPreTrainedModel:
    """The model of a run at its initial values, on the CPU; torch's own initial values are never drawn.

    Not `drawn`: parameters have any values, and are to be loaded.
    """
    with torch.device("meta"):
        model = build_model(config)
    initialize(model, seed, only=None if drawn else ())
    return model


def initialize(model: ViTPreTrainedModel, seed: int, only: Container[str] | None = None) -> None:
    """Fill every parameter (or `only` those), on the CPU, from a generator of its own seeded by (seed, its name).

    Biases are 0 and layer norms 1. MAE: weights, the patch embedding as a matrix and query, key and
    value as one, by xavier_uniform, tokens by normal(0.02) (facebookresearch/mae, models_mae.py,
    initialize_weights). The others: weights, tokens and learned positions by trunc_normal(0.02), as
    timm's ViT and SimMIM have it (transformers draws weights from normal(0.02), the same but for the
    far tails, and starts the mask token from 0). 0.02 is the config's initializer_range. The patch
    embedding's bias, which the MAE code leaves to torch's convolution, is 0 as in transformers.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu")
    draw_matrix = _xavier if isinstance(model, ViTMAEForPreTraining) else _trunc_normal
    draw_token = _normal if isinstance(model, ViTMAEForPreTraining) else _trunc_normal
    std = model.config.initializer_range

    @torch.no_grad()
    def fill(module: nn.Module, prefix: str, name: str, parameter: Tensor) -> None:
        if isinstance(module, nn.LayerNorm):
            parameter.fill_(1.0 if name == "weight" else 0.0)
        elif name == "bias":
            parameter.zero_()
        elif name.startswith("layer_scale"):
            assert model.config.layer_scale_init_value is not None
            parameter.fill_(model.config.layer_scale_init_value)
        else:
            draw = draw_matrix if isinstance(module, (nn.Linear, nn.Conv2d)) else draw_token
            draw(parameter, std, _generator(seed, f"{prefix}.{name}"))

    filled = [
        (module, prefix, name, parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if only is None or f"{prefix}.{name}".removeprefix(".") in only
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # a billion numbers take one core ten seconds
        list(pool.map(lambda each: fill(*each), filled))
    with torch.no_grad():
        fill_fixed_positions(model)


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(rng.key("init", seed, rng.purpose_code(name)))


def _xavier(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)


def _normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    nn.init.normal_(parameter, std=std, generator=generator)


def _trunc_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(parameter, std=std, generator=generator)
