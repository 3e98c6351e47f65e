"""What several keys must satisfy together, told before any process group is made."""

from __future__ import annotations

import math

from vitscale.config.schema import Model, RunConfig
from vitscale.errors import ConfigError
from vitscale.world import World


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (value, value) if isinstance(value, int) else value


def grid(model: Model) -> tuple[int, int]:
    """Patches along (height, width)."""
    (height, width), (patch_height, patch_width) = pair(model.image_size), pair(model.patch_size)
    return height // patch_height, width // patch_width


def accumulation(config: RunConfig, world: World) -> int:
    """Micro-batches that one rank runs a step."""
    return config.train.global_batch // (config.train.micro_batch * world.world_size)


def check_config(config: RunConfig, world: World) -> None:
    """Raise ConfigError where keys contradict each other or the world."""
    _check_batch(config, world)
    _check_model(config)
    _check_objective(config)
    _check_parallel(config, world)
    train = config.train
    if train.steps is None and train.epochs is None:
        raise ConfigError("train.steps and train.epochs are both null: set one, say train.epochs=800")


def _check_batch(config: RunConfig, world: World) -> None:
    batch, micro = config.train.global_batch, config.train.micro_batch
    ranks, lanes = world.world_size, config.data.lanes
    if batch % (micro * ranks):
        fitting = [size for size in range(1, batch // ranks + 1) if batch % (size * ranks) == 0]
        nearest = min(fitting, key=lambda size: abs(size - micro)) if batch % ranks == 0 else None
        multiple = f"set train.global_batch to a multiple of {micro * ranks}"
        way = f"set train.micro_batch={nearest}" if nearest else multiple
        raise ConfigError(
            f"train.global_batch={batch}: must be a multiple of train.micro_batch={micro} x {ranks} ranks; {way}"
        )
    if batch % lanes:
        divisor = max(size for size in range(1, min(lanes, batch) + 1) if batch % size == 0)
        raise ConfigError(f"data.lanes={lanes}: must divide train.global_batch={batch}; set data.lanes={divisor}")
    if config.data.window % lanes:
        raise ConfigError(
            f"data.window={config.data.window}: must be a multiple of data.lanes={lanes}; "
            f"set data.window={(config.data.window // lanes + 1) * lanes}"
        )
    weights = {source.weight for source in config.data.train}
    if len(weights) > 1:
        raise ConfigError(
            f"data.train: weights {sorted(weights)}: sources of different weight cannot be mixed yet; give all the same"
        )


def _check_model(config: RunConfig) -> None:
    model = config.model
    for name, size, patch in zip(("height", "width"), pair(model.image_size), pair(model.patch_size), strict=True):
        if patch <= 0 or size <= 0 or size % patch:
            fitting = max(1, round(size / patch)) * patch if patch > 0 else "a multiple of a patch above 0"
            raise ConfigError(
                f"model.image_size={model.image_size}: its {name} must be a multiple of "
                f"model.patch_size={model.patch_size}; set model.image_size={fitting}"
            )
    if model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size}: must be a multiple of "
            f"model.num_attention_heads={model.num_attention_heads}"
        )
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if getattr(model, name) > 0:
            raise ConfigError(
                f"model.{name}={getattr(model, name)}: must be 0 in training, since its draws would depend on the "
                "number of ranks; use model.drop_path_rate instead"
            )
    for name in ("mean", "std"):
        values = getattr(config.augment, name)
        if len(values) not in (1, model.num_channels):
            raise ConfigError(
                f"augment.{name}={list(values)}: needs one number for all channels or "
                f"{model.num_channels}, one for each of model.num_channels"
            )


def _check_objective(config: RunConfig) -> None:
    objective, (rows, columns) = config.objective, grid(config.model)
    cell = objective.simmim.mask_patch
    if objective.name in ("simmim", "multitask"):
        if rows % cell or columns % cell:
            raise ConfigError(
                f"objective.simmim.mask_patch={cell}: must divide the {rows}x{columns} grid of patches; "
                "set it to 1, or change model.image_size"
            )
        cells = (rows // cell) * (columns // cell)
        if not 0 < math.ceil(cells * objective.simmim.mask_ratio) < cells:
            raise ConfigError(
                f"objective.simmim.mask_ratio={objective.simmim.mask_ratio}: of {cells} cells it must hide at least "
                "one and leave one; lower objective.simmim.mask_patch"
            )
    if objective.name == "mae":
        kept = int(rows * columns * (1 - objective.mae.mask_ratio))
        if not 0 < kept < rows * columns:
            raise ConfigError(
                f"objective.mae.mask_ratio={objective.mae.mask_ratio}: of {rows * columns} patches it must hide at "
                "least one and leave one"
            )
        decoder, heads = objective.mae.decoder_hidden_size, objective.mae.decoder_num_attention_heads
        if decoder % heads:
            raise ConfigError(
                f"objective.mae.decoder_hidden_size={decoder}: must be a multiple of "
                f"objective.mae.decoder_num_attention_heads={heads}"
            )
    widths = {"model.hidden_size": config.model.hidden_size}
    if objective.name == "mae":
        widths["objective.mae.decoder_hidden_size"] = objective.mae.decoder_hidden_size
    positions = config.model.position_embeddings
    sincos = positions == "sincos" or (positions == "auto" and objective.name == "mae")
    for key, width in widths.items():
        if sincos and width % 4:
            raise ConfigError(f"{key}={width}: must be a multiple of 4 for sin-cos position embeddings")
    if objective.needs_labels and config.model.num_labels < 1:
        raise ConfigError(
            f"model.num_labels={config.model.num_labels}: objective.name={objective.name} needs at least 1; "
            "set it to the number of classes"
        )


def _check_parallel(config: RunConfig, world: World) -> None:
    parallel, train = config.parallel, config.train
    if parallel.zero_stage == 1 and train.precision == "bf16" and accumulation(config, world) > 1:
        raise ConfigError(
            "parallel.zero_stage=1 with train.precision=bf16 and gradient accumulation "
            f"({accumulation(config, world)} micro-batches a step): DeepSpeed would sum gradients in bf16; "
            "set parallel.zero_stage=2"
        )
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        raise ConfigError("parallel.offload_optimizer=true: needs ZeRO; set parallel.zero_stage to 1, 2 or 3")
