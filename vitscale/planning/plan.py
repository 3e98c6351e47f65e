"""What a run needs before a GPU is rented: memory, speed, hours, loader, checkpoints; and what to set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from vitscale.config.check import accumulation, check_config
from vitscale.config.schema import CHECKPOINTING, RunConfig
from vitscale.errors import ConfigError
from vitscale.models.auto import build_model
from vitscale.planning.gpus import GPUS, Gpu
from vitscale.planning.memory import Activations, Memory, activations, memory
from vitscale.planning.speed import StepSeconds, step_seconds
from vitscale.world import World

_CORE_S_A_KB = 13.5e-6  # of a JPEG's decoding and crop: 0.81 ms for 60 kB (docs/measurements.md, Loader)
_GPU_HOURS_A_FAILURE = 54 * 24 * 16384 / 419  # of Llama 3's run on H100s, unexpected ones (arXiv 2407.21783, table 5)


@dataclass(frozen=True)
class Cluster:
    """What is rented, beside the GPU's name."""

    gpu: Gpu
    gpus: int
    a_node: int = 8
    network_gb_s: float = 400.0  # of a node, in each direction: 8 adapters of 400 Gb/s
    disk_gb_s: float = 5.0  # of the file system that takes the checkpoints, in all
    price: float | None = None  # of a GPU-hour
    failure_hours: float | None = None  # between two of the whole job; None: by the number of GPUs
    restart_s: float = 180.0  # from a failure to the next step, the steps that are repeated not included

    def world(self) -> World:
        return World(world_size=self.gpus, local_world_size=min(self.gpus, self.a_node), device="cuda")

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.a_node)

    @property
    def hours_between_failures(self) -> float:
        return self.failure_hours or _GPU_HOURS_A_FAILURE / self.gpus


@dataclass(frozen=True)
class Estimate:
    """A config on a cluster."""

    config: RunConfig
    memory: Memory
    step: StepSeconds
    fits: bool

    @property
    def images_per_second(self) -> float:
        return self.config.train.global_batch / self.step.total


class Planner:
    """Estimates of one run's config, and of what could be set in it, on a cluster."""

    def __init__(self, config: RunConfig, cluster: Cluster) -> None:
        """ConfigError where the config cannot run on so many GPUs."""
        check_config(config, cluster.world())
        self.config, self.cluster = config, cluster
        with torch.device("meta"):
            model = build_model(config)
        self.parameters, self.flops = model.num_parameters(), model.flops_per_image()
        self._activations: Callable[[RunConfig], Activations] = cache(activations)

    def estimate(self, config: RunConfig) -> Estimate:
        world, gpu = self.cluster.world(), self.cluster.gpu
        step = self.activations(config).of(config.train.micro_batch)
        needed = memory(config, world, self.parameters, step)
        return Estimate(config, needed, self._seconds(config, self.cluster), needed.total_bytes <= gpu.memory)

    def _seconds(self, config: RunConfig, cluster: Cluster) -> StepSeconds:
        # By what a step at stage 0 makes, of which the constants are: that bf16 weights move less no GPU has shown yet.
        whole = replace(config, parallel=replace(config.parallel, zero_stage=0))
        step = self.activations(whole).of(config.train.micro_batch)
        network = cluster.network_gb_s * 1e9
        return step_seconds(config, cluster.world(), cluster.gpu, self.parameters, self.flops, step, network)

    def activations(self, config: RunConfig) -> Activations:
        """By what decides them: stages 1 to 3 are alike, and the batch is no part of them."""
        stage = min(config.parallel.zero_stage, 1)
        train = replace(self.config.train, gradient_checkpointing=config.train.gradient_checkpointing)
        return self._activations(
            replace(self.config, train=train, parallel=replace(self.config.parallel, zero_stage=stage))
        )

    def fastest(self) -> Estimate | None:
        """The stage, micro-batch and checkpointing by which this global batch goes fastest; None if none fits.

        Where two are within 2%, that of the lower stage, without checkpointing, and with more memory to spare.
        """
        fitting = [each for each in map(self.estimate, self._choices()) if each.fits]
        if not fitting:
            return None
        fast = 0.98 * max(each.images_per_second for each in fitting)

        def rank(each: Estimate) -> tuple[int, int, int]:
            config = each.config
            return (
                config.parallel.zero_stage,
                CHECKPOINTING.index(config.train.gradient_checkpointing),
                each.memory.total_bytes,
            )

        return min((each for each in fitting if each.images_per_second >= fast), key=rank)

    def _choices(self) -> Iterator[RunConfig]:
        config, images = self.config, self.config.train.global_batch // self.cluster.gpus
        divisors = [number for number in range(1, images + 1) if images % number == 0]
        stages = (0,) if self.cluster.gpus == 1 else (0, 1, 2, 3)
        if config.parallel.offload_optimizer:
            stages = (config.parallel.zero_stage,)
        for stage in stages:
            for again in CHECKPOINTING:
                if again and config.train.cuda_graphs:
                    continue
                for micro in divisors:
                    train = replace(config.train, micro_batch=micro, gradient_checkpointing=again)
                    graphs = train.cuda_graphs and stage < 3
                    train = replace(train, cuda_graphs=graphs)
                    yield replace(config, train=train, parallel=replace(config.parallel, zero_stage=stage))

    def scaling(self) -> list[tuple[int, float]]:
        """(GPUs, images a second) of this global batch at 1, 2, 4, ... nodes, where it can be shared out."""
        points, nodes = [], 1
        while nodes <= max(16, self.cluster.nodes):
            cluster = replace(self.cluster, gpus=nodes * self.cluster.a_node)
            images, left = divmod(self.config.train.global_batch, cluster.gpus)
            if not left and images:
                micro = math.gcd(images, self.config.train.micro_batch)
                config = replace(self.config, train=replace(self.config.train, micro_batch=micro))
                points.append((cluster.gpus, config.train.global_batch / self._seconds(config, cluster).total))
            nodes *= 2
        return points


def plan(planner: Planner, images: int | None = None, image_kb: float = 110.0) -> dict[str, Any]:
    """All of it, as `--json` prints it. images: of the data set, for train.epochs; image_kb: of one, compressed."""
    config, cluster = planner.config, planner.cluster
    world, gpu = cluster.world(), cluster.gpu
    now, fastest = planner.estimate(config), planner.fastest()
    counted = planner.activations(config)
    rate, micro = now.images_per_second, config.train.micro_batch
    by_part = {name: round(each.peak * micro) for name, each in counted.an_image.items()}
    return {
        "gpu": gpu.name,
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "parameters": planner.parameters,
        "flops_per_image": planner.flops,
        **_settings(config, world),
        "fits": now.fits,
        "memory": asdict(now.memory)
        | {"allocated_bytes": now.memory.allocated_bytes, "total_bytes": now.memory.total_bytes}
        | {"of_bytes": gpu.memory, "activations_by_part": by_part | {"fixed": round(counted.fixed.peak)}},
        "step_seconds": asdict(now.step) | {"total": now.step.total, "bound_by": now.step.bound_by},
        "images_per_second": rate,
        "mfu": rate * planner.flops / (cluster.gpus * gpu.flops),
        "fastest": None if fastest is None else _settings(fastest.config, world)
        | {"images_per_second": fastest.images_per_second, "total_bytes": fastest.memory.total_bytes}
        | {"keys": as_keys(_settings(fastest.config, world))},
        "run": _run(planner, rate, images),
        "loader": {
            "cores_a_node": rate / cluster.nodes * image_kb * _CORE_S_A_KB,
            "bytes_per_second_a_node": rate / cluster.nodes * image_kb * 1e3,
        },
        "checkpoint": _checkpoint(planner, now),
        "scaling": [{"gpus": gpus, "images_per_second": speed} for gpus, speed in planner.scaling()],
    }  # fmt: skip


def _settings(config: RunConfig, world: World) -> dict[str, Any]:
    return {
        "zero_stage": config.parallel.zero_stage,
        "micro_batch": config.train.micro_batch,
        "accumulation": accumulation(config, world),
        "gradient_checkpointing": config.train.gradient_checkpointing,
    }


def _run(planner: Planner, rate: float, images: int | None) -> dict[str, Any]:
    """Hours and cost to the end of the recipe; nothing where its epochs are of unknown length."""
    train, cluster = planner.config.train, planner.cluster
    steps = train.steps
    if steps is None and images is not None:
        if images < train.global_batch:
            raise ConfigError(f"--images {images}: must be train.global_batch={train.global_batch} or more")
        steps = max(1, int((train.epochs or 0) * (images // train.global_batch)))
    if steps is None:
        return {"steps": None}
    hours = steps * train.global_batch / rate / 3600
    cost = None if cluster.price is None else hours * cluster.gpus * cluster.price
    return {"steps": steps, "hours": hours, "gpu_hours": hours * cluster.gpus, "cost": cost}


def _checkpoint(planner: Planner, now: Estimate) -> dict[str, Any]:
    """Size and time of a save, how often to save, and what a failure costs."""
    config, cluster = planner.config, planner.cluster
    size = planner.parameters * 4 * (3 if config.train.ema_decay is None else 4)
    save_s, between_s = size / (cluster.disk_gb_s * 1e9), cluster.hours_between_failures * 3600
    young_daly = math.sqrt(2 * save_s * between_s)
    # The interval by which most of the time is spent on new steps where a save runs beside them (arXiv 2410.18124).
    available = save_s + math.sqrt(2 * (between_s + cluster.restart_s) * save_s + save_s**2)
    own = config.checkpoint.every_steps * now.step.total
    lost = own / 2 + cluster.restart_s
    return {
        "bytes": size,
        "save_seconds": save_s,
        "hours_between_failures": cluster.hours_between_failures,
        "young_daly_seconds": young_daly,
        "most_available_seconds": available,
        "every_steps": max(1, round(available / now.step.total)),
        "config_every_seconds": own,
        "seconds_lost_a_failure": lost,
        "goodput": between_s / (between_s + lost),
    }


def advice(config: RunConfig, world: World, gpu_bytes: int) -> str:
    """What to set where a step of this config did not fit into so much memory of each GPU, as the end of a sentence."""
    gpu = replace(GPUS["h100"], memory_gb=gpu_bytes / 1e9)  # whose speed decides between what fits
    best = Planner(config, Cluster(gpu, world.world_size, world.local_world_size)).fastest()
    if best is None:
        return "by `vitscale plan` no ZeRO stage fits, not with gradient checkpointing either: take larger or more GPUs"
    return f"by `vitscale plan` this fits, and is the fastest: {as_keys(_settings(best.config, world))}"


def as_keys(settings: dict[str, Any]) -> str:
    """Settings as words of the command line."""
    return (
        f"parallel.zero_stage={settings['zero_stage']} train.micro_batch={settings['micro_batch']} "
        f"train.gradient_checkpointing={str(settings['gradient_checkpointing']).lower()}"
    )
