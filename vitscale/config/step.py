"""How a step is shared out: the global batch over ranks and micro-batches, the run's state by the ZeRO stage; and what
the two keys that say so can come to where they are auto."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vitscale.config.schema import AUTO, RunConfig
from vitscale.errors import ConfigError
from vitscale.world import World

LIVE_ELEMENTS = 1_000_000_000  # of weights that ZeRO-3 keeps gathered on a rank at most
_BUCKETS, _SMALLEST_BUCKET, _LARGEST_BUCKET = 8, 1_000_000, 25_000_000


def accumulation(config: RunConfig, world: World) -> int:
    """Micro-batches that one rank runs a step."""
    return config.train.global_batch // (config.train.micro_batch * world.world_size)


def bucket_elements(config: RunConfig, trained: int) -> int:
    """Gradients that ZeRO reduces at once, of so many trained parameters. DeepSpeed takes the memory for all of a
    bucket, whatever comes to lie in it.

    Where nothing is asked for, all but the last eighth can be exchanged beside the backward, and an exchange is long
    enough for its start not to matter.
    """
    asked = config.parallel.bucket_elements
    return min(trained, asked or min(max(trained // _BUCKETS, _SMALLEST_BUCKET), _LARGEST_BUCKET))


def total_steps(config: RunConfig, batches_per_epoch: int) -> int:
    """Optimizer steps of a run: train.steps, or those in train.epochs."""
    return config.train.steps or max(1, int((config.train.epochs or 0) * batches_per_epoch))


def step_keys(config: RunConfig) -> dict[str, Any]:
    """The two keys, with their values."""
    return {"parallel.zero_stage": config.parallel.zero_stage, "train.micro_batch": config.train.micro_batch}


def auto_keys(config: RunConfig) -> list[str]:
    """Those of them that are left to the run."""
    return [key for key, value in step_keys(config).items() if value == AUTO]


def with_step(config: RunConfig, stage: int, micro_batch: int) -> RunConfig:
    """The config with these two."""
    parallel = replace(config.parallel, zero_stage=stage)
    return replace(config, train=replace(config.train, micro_batch=micro_batch), parallel=parallel)


def choices(config: RunConfig, world: World) -> list[RunConfig]:
    """What a config can come to on these ranks, by stage and then by micro-batch: itself where nothing is auto.

    ConfigError where there is nothing, since keys contradict each other or the world.
    """
    found, refusals = [], []
    for each in _written_out(config, world):
        try:
            _check(each, world)
            found.append(each)
        except ConfigError as refusal:
            refusals.append(refusal)
    keys = auto_keys(config)
    if not found and keys:
        raise ConfigError(f"{refusals[0]} (whatever {' and '.join(keys)} comes to)")
    if not found:
        raise refusals[0]
    return found


def _written_out(config: RunConfig, world: World) -> Iterator[RunConfig]:
    keys, ranks = auto_keys(config), world.world_size
    # One rank has nobody to share with: beside DDP there is only what takes the state off the GPU.
    stages = (0, 1, 2, 3) if ranks > 1 or config.parallel.offload_optimizer else (0,)
    share = max(1, config.train.global_batch // ranks)
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    for stage in stages if "parallel.zero_stage" in keys else (config.parallel.zero_stage,):
        for micro_batch in divisors if "train.micro_batch" in keys else (config.train.micro_batch,):
            yield with_step(config, stage, micro_batch)


def _check(config: RunConfig, world: World) -> None:
    """ConfigError where stage or micro-batch contradict other keys, or the world."""
    parallel, train, augment = config.parallel, config.train, config.augment
    batch, micro, ranks = train.global_batch, train.micro_batch, world.world_size
    if batch % (micro * ranks):
        fitting = [size for size in range(1, batch // ranks + 1) if batch % (size * ranks) == 0]
        nearest = min(fitting, key=lambda size: abs(size - micro)) if batch % ranks == 0 else None
        multiple = f"set train.global_batch to a multiple of {micro * ranks}"
        way = f"set train.micro_batch={nearest}" if nearest else multiple
        raise ConfigError(
            f"train.global_batch={batch}: must be a multiple of train.micro_batch={micro} x {ranks} ranks; {way}"
        )
    mixing = [f"augment.{name}={getattr(augment, name)}" for name in ("mixup", "cutmix") if getattr(augment, name)]
    if mixing and micro % 2:
        raise ConfigError(
            f"{', '.join(mixing)}: mixes neighbours, and train.micro_batch={micro} is odd; set an even one, or "
            "augment.mixup=0 augment.cutmix=0"
        )
    if parallel.zero_stage == 1 and train.precision == "bf16" and accumulation(config, world) > 1:
        raise ConfigError(
            "parallel.zero_stage=1 with train.precision=bf16 and gradient accumulation "
            f"({accumulation(config, world)} micro-batches a step): DeepSpeed would sum gradients in bf16; "
            "set parallel.zero_stage=2"
        )
    if train.cuda_graphs:
        _check_cuda_graphs(config)
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        raise ConfigError("parallel.offload_optimizer=true: needs ZeRO; set parallel.zero_stage to 1, 2 or 3")


def _check_cuda_graphs(config: RunConfig) -> None:
    """A graph reads weights at one place, and runs a block once in each direction with a gradient."""
    stage, train = config.parallel.zero_stage, config.train
    values = {"train.gradient_checkpointing": train.gradient_checkpointing, "train.freeze": train.freeze}
    for key, value in {"parallel.zero_stage": stage if stage == 3 else 0, **values}.items():
        if value:
            raise ConfigError(f"train.cuda_graphs=true: cannot be beside {key}={value}; change one of the two")
