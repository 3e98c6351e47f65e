"""What several keys must satisfy together, told before any process group is made."""

from __future__ import annotations

import math

from vitscale.config import model_rules
from vitscale.config.augmentation import SHIFT, colour_operations
from vitscale.config.model_rules import pair
from vitscale.config.schema import Model, RunConfig
from vitscale.config.step import auto_keys, choices
from vitscale.errors import ConfigError
from vitscale.text import did_you_mean
from vitscale.world import World

_MOST_LANES = 1024  # each lane's shards are open at once, and an epoch drops up to a sample a lane


def grid(model: Model) -> tuple[int, int]:
    """Patches along (height, width)."""
    (height, width), (patch_height, patch_width) = pair(model.image_size), pair(model.patch_size)
    return height // patch_height, width // patch_width


def mask_patch(config: RunConfig) -> int:
    """Side of SimMIM's cells, in patches: as written, else the largest up to 2 that divides the grid
    and leaves a cell visible."""
    written, (rows, columns) = config.objective.simmim.mask_patch, grid(config.model)
    if written is not None:
        return written
    divides = rows % 2 == 0 and columns % 2 == 0
    return 2 if divides and _hides_some(rows * columns // 4, config.objective.simmim.mask_ratio) else 1


def _hides_some(cells: int, mask_ratio: float) -> bool:
    """Whether SimMIM hides a cell and leaves one: of one cell it cannot."""
    return 0 < math.ceil(cells * mask_ratio) < cells


def lanes(config: RunConfig) -> int:
    """Parallel runs through an epoch's shards: as written, else the largest divisor of the global batch up to 1024 and
    to a quarter of it (with augment.repeats one in 2 x repeats). Independent of the world, so that a run resumes on any
    number of ranks in the same order.
    """
    written, batch = config.data.lanes, config.train.global_batch
    return written or _largest_divisor(batch, min(batch // max(4, 2 * config.augment.repeats), _MOST_LANES))


def _largest_divisor(number: int, most: int) -> int:
    return max((size for size in range(1, most + 1) if number % size == 0), default=1)


def too_few_lanes(config: RunConfig, world: World) -> str | None:
    """A warning if there are more ranks than lanes: several then read each shard, each its part of every block.

    No warning for ranks that do not divide the lanes: only the lanes at their borders are read by two ranks,
    fewer lanes than ranks, so that shards are opened less than twice as often and no sample is read twice.
    """
    ranks, here, window = world.world_size, lanes(config), config.data.window
    if ranks <= here:
        return None
    way = f"data.lanes={ranks}" + (f" data.window={-(-window // ranks) * ranks}" if window % ranks else "")
    return (
        f"data.lanes={here}{'' if config.data.lanes else ' (of train.global_batch)'}: fewer than the {ranks} ranks, "
        f"so that several of them read each shard; for a new run set {way}"
    )


def one_to_choose(config: RunConfig) -> str | None:
    """A warning if the best checkpoint is the last one, as no other is scored."""
    best = config.train.keep_best
    if best is None or is_scored_underway(config):
        return None
    return f"train.keep_best={best}: only the end is scored, so that it is the best; set evaluation.every_epochs=1"


def check_config(config: RunConfig, world: World) -> None:
    """Raise ConfigError where keys contradict each other or the world."""
    choices(config, world)
    _check_batch(config)
    _check_sources(config)
    _check_model(config)
    _check_objective(config)
    _check_augment(config)
    _check_validation(config)
    train = config.train
    if train.steps is None and train.epochs is None:
        raise ConfigError("train.steps and train.epochs are both null: set one, say train.epochs=800")


def _check_batch(config: RunConfig) -> None:
    batch, written = config.train.global_batch, config.data.lanes
    if written and batch % written:
        raise ConfigError(
            f"data.lanes={written}: must divide train.global_batch={batch}; "
            f"set data.lanes={_largest_divisor(batch, written)}"
        )
    if written and config.data.window % written:
        raise ConfigError(
            f"data.window={config.data.window}: must be a multiple of data.lanes={written}; "
            f"set data.window={(config.data.window // written + 1) * written}"
        )
    if config.data.batch_bytes is not None and "train.micro_batch" in auto_keys(config):
        raise ConfigError(
            f"train.micro_batch=auto: by data.batch_bytes={config.data.batch_bytes} the pixels of an image depend on "
            "it; write a number, or set data.batch_bytes=null"
        )
    repeats, share = config.augment.repeats, batch // lanes(config)
    if repeats > 1 and share < 2 * repeats:
        way = f"data.lanes={batch // (2 * repeats)}" if written else f"train.global_batch={2 * repeats}"
        raise ConfigError(
            f"augment.repeats={repeats}: a batch holds {share} samples of each of {lanes(config)} lanes, and needs "
            f"{2 * repeats} or more; lower it, or set {way} or {'less' if written else 'more'}"
        )
    if config.data.epoch_samples is not None and config.data.epoch_samples < batch:
        raise ConfigError(f"data.epoch_samples={config.data.epoch_samples}: must be train.global_batch={batch} or more")


def _check_sources(config: RunConfig) -> None:
    """Sources of data.train are mixed by one rule, and other keys have none."""
    train = config.data.train
    weighted = [source for source in train if source.weight is not None]
    if weighted and len(weighted) < len(train):
        without = next(source for source in train if source.weight is None)
        has = f"repeat={without.repeat:g} and " if without.repeat is not None else ""
        raise ConfigError(
            f"data.train: pattern={without.pattern}: has {has}no weight, and {weighted[0].pattern} has one; give a "
            "weight to all sources, or to none"
        )
    data, evaluation = config.data, config.evaluation
    others = {"data.validation": data.validation, "evaluation.train": evaluation.train}
    for key, sources in (others | {"evaluation.test": evaluation.test}).items():
        if any((source.weight, source.repeat) != (None, None) for source in sources):
            raise ConfigError(f"{key}: weight and repeat are for data.train, images here count once: leave them out")


def _check_model(config: RunConfig) -> None:
    model = config.model
    for key, value, rule in model_rules.of_encoder(vars(model), positions(config), _key):
        raise ConfigError(f"{_key(key)}={value}: must be {rule}{_remedy(key, rule, model)}")
    if model.encoder_stride is not None and pair(model.patch_size) != pair(model.encoder_stride):
        raise ConfigError(
            f"model.encoder_stride={model.encoder_stride}: must be model.patch_size={model.patch_size}; "
            "set model.encoder_stride=null"
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


def _check_validation(config: RunConfig) -> None:
    data, train, objective = config.data, config.train, config.objective
    if data.validation and data.validation_fraction:
        raise ConfigError(
            f"data.validation_fraction={data.validation_fraction}: is for a run without data.validation; set it to 0"
        )
    if train.keep_best is not None and not has_validation(config):
        raise ConfigError(
            f"train.keep_best={train.keep_best}: there is nothing to score: name data.validation, or set "
            "data.validation_fraction=0.1"
        )
    if train.keep_best is not None and train.keep_best.startswith("validation/raw_"):
        way = train.keep_best.replace("raw_", "")
        raise ConfigError(
            f"train.keep_best={train.keep_best}: is of the weights themselves, and model/ gets their moving average "
            f"(train.ema_decay); set train.keep_best={way}"
        )
    names = [f"validation/{name}" for name in scores_of_validation(config)]
    if train.keep_best is not None and train.keep_best not in names:
        hint = did_you_mean(train.keep_best, names)
        raise ConfigError(f"train.keep_best={train.keep_best}: must be one of {', '.join(names)}{hint}")
    if train.early_stopping is not None and not is_scored_underway(config):
        raise ConfigError(
            f"train.early_stopping={train.early_stopping}: evaluation.every_steps and evaluation.every_epochs are both "
            "null, so that only the end would be scored; set evaluation.every_epochs=1"
        )
    weights, classes = objective.classification.class_weights, config.model.num_labels
    if weights is not None and not has_classes(config):
        raise ConfigError(
            f"objective.classification.class_weights={weights}: is for one class an image; set it to null"
        )
    if isinstance(weights, tuple) and len(weights) != classes:
        raise ConfigError(
            f"objective.classification.class_weights: are {len(weights)}, and model.num_labels={classes}; give one a "
            "class"
        )
    blocks = config.model.num_hidden_layers
    if train.freeze > blocks:
        raise ConfigError(f"train.freeze={train.freeze}: the model has {blocks} blocks; set train.freeze={blocks}")


def _check_augment(config: RunConfig) -> None:
    augment, model = config.augment, config.model
    if model.num_channels != 3 and (names := colour_operations(augment)):
        raise ConfigError(
            f"augment: {', '.join(names)}: are of red, green and blue, and model.num_channels={model.num_channels}; "
            "leave them out, or name others in augment.steps"
        )
    height, width = pair(model.image_size)
    if augment.quarter_turns and height != width:
        raise ConfigError(f"augment.quarter_turns=true: model.image_size={[height, width]} must be a square")
    if augment.crop == "simple" and min(height, width) <= SHIFT:
        raise ConfigError(f"augment.crop=simple: model.image_size={model.image_size}: must be above {SHIFT} pixels")
    mixing = [f"augment.{name}={getattr(augment, name)}" for name in ("mixup", "cutmix") if getattr(augment, name)]
    if not mixing:
        return
    if problem_type(config) in (None, "regression"):
        raise ConfigError(
            f"{', '.join(mixing)}: mixes the labels of classes, and objective.name={config.objective.name} has none; "
            "set augment.mixup=0 augment.cutmix=0"
        )


def _check_objective(config: RunConfig) -> None:
    name = config.objective.name
    if name in ("mae", "simmim", "multitask"):
        _check_grid(config)
    if name in ("simmim", "multitask"):
        _check_simmim(config)
    if name == "mae":
        _check_mae(config)
    _check_positions(config)
    if config.objective.needs_labels:
        _check_labels(config)


def _check_positions(config: RunConfig) -> None:
    name, kind = config.objective.name, positions(config)
    if name == "mae":
        values = vars(config.model) | {f"decoder_{key}": value for key, value in _decoder(config).items()}
        for key, value, rule in model_rules.of_blocks(values, kind, "decoder_", _key):
            raise ConfigError(f"{_key(key)}={value}: must be {rule}{_remedy(key, rule, config.model)}")
    if name != "classification":
        for key, value, rule in model_rules.of_pretraining(vars(config.model), kind, f"objective.name={name}", _key):
            raise ConfigError(f"{_key(key)}={value}: must be {rule}; set model.position_embeddings=auto")


def positions(config: RunConfig) -> str:
    """The kind of positions that the model has: auto is sincos for mae, else learned."""
    kind = config.model.position_embeddings
    return kind if kind != "auto" else "sincos" if config.objective.name == "mae" else "learned"


def _decoder(config: RunConfig) -> dict[str, int]:
    mae = config.objective.mae
    return {"hidden_size": mae.decoder_hidden_size, "num_attention_heads": mae.decoder_num_attention_heads}


def _key(key: str) -> str:
    """How a run's config writes a key of the model."""
    return f"objective.mae.{key}" if key.startswith("decoder_") else f"model.{key}"


def _remedy(key: str, rule: str, model: Model) -> str:
    """What to set where a value is not what it must be, if it can be told."""
    if key == "image_size":
        sizes = zip(pair(model.image_size), pair(model.patch_size), strict=True)
        height, width = (max(1, round(size / patch)) * patch for size, patch in sizes)
        return f"; set model.image_size={_size(height, width)}"
    if "rope_theta" in rule:
        return "; set model.rope_theta=null"
    return "; set model.pooling=mean" if key == "pooling" else ""


_LOSSES = {"single_label_classification": ("ce", "bce"), "multi_label_classification": ("bce",)}


def _check_labels(config: RunConfig) -> None:
    model, name, smoothing = config.model, config.objective.name, config.objective.classification.label_smoothing
    if model.num_labels < 1:
        raise ConfigError(
            f"model.num_labels={model.num_labels}: objective.name={name} needs at least 1; "
            "set it to the number of classes"
        )
    single = "single_label_classification"
    if name == "multitask" and model.problem_type not in (None, single):
        raise ConfigError(
            f"model.problem_type={model.problem_type}: is not what objective.name=multitask can train; "
            f"set model.problem_type={single}"
        )
    kind, loss = problem_type(config), config.objective.classification.loss
    if loss is not None and loss not in _LOSSES.get(kind or "", ()):
        raise ConfigError(
            f"objective.classification.loss={loss}: is of classes, and model.problem_type={kind} has its own loss; "
            "leave it out"
        )
    if kind != single and smoothing:
        raise ConfigError(
            f"objective.classification.label_smoothing={smoothing}: is for one class an image, and "
            f"model.problem_type is {kind}; set objective.classification.label_smoothing=0"
        )


def problem_type(config: RunConfig) -> str | None:
    """What a run learns of its labels, in transformers' words; None where it needs none."""
    if not config.objective.needs_labels:
        return None
    is_regression = config.objective.name != "multitask" and config.model.num_labels == 1
    return config.model.problem_type or ("regression" if is_regression else "single_label_classification")


def scores_of_validation(config: RunConfig) -> tuple[str, ...]:
    """What held-out images give that says how good a model is: see evaluation/metrics.py."""
    kind = problem_type(config) if config.objective.name == "classification" else None
    if kind is None:
        return ("loss",)
    if kind == "regression":
        return ("loss", "mse", "mae", "r2")
    if kind == "multi_label_classification":
        return ("loss", "map", "macro_f1", "auc")
    return ("loss", "top1", *(("top5",) if config.model.num_labels > 5 else ()), "balanced_accuracy", "macro_f1", "auc")


def has_validation(config: RunConfig) -> bool:
    return bool(config.data.validation or config.data.validation_fraction)


def is_scored_underway(config: RunConfig) -> bool:
    """Whether a run is scored before its end too."""
    return (config.evaluation.every_steps or config.evaluation.every_epochs) is not None


def has_classes(config: RunConfig) -> bool:
    """Whether a label is the number of a class."""
    return problem_type(config) == "single_label_classification"


def _check_grid(config: RunConfig) -> None:
    model = config.model
    if grid(model) == (1, 1):
        height, width = pair(model.patch_size)
        raise ConfigError(
            f"model.image_size={model.image_size}: is one patch of model.patch_size={model.patch_size}, of which "
            f"objective.name={config.objective.name} can hide none; lower model.patch_size, or "
            f"set model.image_size={_size(2 * height, 2 * width)}"
        )


def _check_simmim(config: RunConfig) -> None:
    simmim, (rows, columns), cell = config.objective.simmim, grid(config.model), mask_patch(config)
    if rows % cell or columns % cell:
        raise ConfigError(
            f"objective.simmim.mask_patch={cell}: must divide the {rows}x{columns} grid of patches; "
            "set objective.simmim.mask_patch=null"
        )
    cells = (rows // cell) * (columns // cell)
    if not _hides_some(cells, simmim.mask_ratio):
        way = "mask_patch=null" if cells == 1 else "mask_ratio=0.5"
        raise ConfigError(
            f"objective.simmim.mask_ratio={simmim.mask_ratio}: of {cells} cells of {cell}x{cell} patches it must hide "
            f"at least one and leave one; set objective.simmim.{way}"
        )


def _check_mae(config: RunConfig) -> None:
    mae, (rows, columns) = config.objective.mae, grid(config.model)
    if not 0 < int(rows * columns * (1 - mae.mask_ratio)) < rows * columns:
        raise ConfigError(
            f"objective.mae.mask_ratio={mae.mask_ratio}: of {rows * columns} patches it must hide at least one and "
            "leave one; set objective.mae.mask_ratio=0.5"
        )
    if mae.norm_pix_loss and math.prod(pair(config.model.patch_size)) * config.model.num_channels == 1:
        raise ConfigError(
            "objective.mae.norm_pix_loss=true: a patch is a single number, which cannot be standardized; "
            "set objective.mae.norm_pix_loss=false"
        )


def _size(height: int, width: int) -> str:
    """A size as one writes it on the command line."""
    return str(height) if height == width else f"[{height},{width}]"
