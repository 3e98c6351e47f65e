"""What a run needs before a GPU is rented: memory, speed, hours, loader, checkpoints; and what to set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vitscale.config.check import check_config
from vitscale.config.schema import AUTO, CHECKPOINTING, RunConfig
from vitscale.config.step import accumulation, auto_keys, choices, with_step
from vitscale.errors import ConfigError
from vitscale.planning.gpus import GPUS, Gpu
from vitscale.planning.length import steps_or_missing
from vitscale.planning.memory import Memory, activations, host_bytes, memory, parameters
from vitscale.planning.speed import StepSeconds, flops, step_seconds
from vitscale.world import World

_ALIKE = 0.98  # of the fastest: what is no slower than this is as fast
_NEAR = 0.9  # as near as the estimated speeds are: a lower stage is taken down to this
_CORE_S_A_KB = 13.5e-6  # of a JPEG's decoding and crop: 0.81 ms for 60 kB (docs/measurements.md, Loader)
_NODES = 16  # at least so many are looked at for other numbers of GPUs
_GRAPHS = (
    "a run with train.cuda_graphs on a GPU, in this version: the host's part is of an earlier one's steps, taken in "
    "one process"
)
_GPU_HOURS_A_FAILURE = 54 * 24 * 16384 / 419  # of Llama 3's run on H100s, unexpected ones (arXiv 2407.21783, table 5)


@dataclass(frozen=True)
class Cluster:
    """What is rented, beside the GPU's name."""

    gpu: Gpu
    gpus: int
    a_node: int = 8
    network_gb_s: float | None = None  # of a node, in each direction; None: the GPU's default
    disk_gb_s: float = 5.0  # of the file system that takes the checkpoints, in all
    price: float | None = None  # of a GPU-hour
    failure_hours: float | None = None  # between two of the whole job; None: by the number of GPUs
    restart_s: float = 180.0  # from a failure to the next step, the steps that are repeated not included
    device: str = "cuda"

    @staticmethod
    def of(world: World, memory: int) -> Cluster:
        """The ranks that there are, each with so many bytes, as if of H100s: speed only decides between what fits."""
        gpu = replace(GPUS["h100"], memory_gb=memory / 1e9)
        return Cluster(gpu, world.world_size, world.local_world_size, device=world.device)

    def world(self) -> World:
        return World(world_size=self.gpus, local_world_size=min(self.gpus, self.a_node), device=self.device)

    @property
    def network(self) -> float:
        """Bytes a second of a node to the others, in each direction."""
        return 1e9 * (self.gpu.network_gb_s if self.network_gb_s is None else self.network_gb_s)

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
        self.count, self.flops = parameters(config), flops(config)
        self.parameters = self.count.all

    def estimate(self, config: RunConfig, ratio: float = 1.0, cluster: Cluster | None = None) -> Estimate:
        """Of a config without auto. ratio: what activations take over what is counted; cluster: another one."""
        cluster = cluster or self.cluster
        world = cluster.world()
        step = activations(config, world.device).of(config.train.micro_batch).times(ratio)
        needed = memory(config, world, self.count, step)
        return Estimate(config, needed, self._seconds(config, cluster), needed.total_bytes <= cluster.gpu.memory)

    def _seconds(self, config: RunConfig, cluster: Cluster) -> StepSeconds:
        # By what a step at stage 0 makes, of which the constants are: that bf16 weights move less no GPU has shown yet.
        whole = replace(config, parallel=replace(config.parallel, zero_stage=0))
        world = cluster.world()
        step = activations(whole, world.device).of(config.train.micro_batch)
        return step_seconds(config, world, cluster.gpu, self.count, self.flops, step, cluster.network)

    def choice(self, ratio: float = 1.0, most: int | None = None, failed: RunConfig | None = None) -> Estimate | None:
        """What `auto` comes to; the config itself where nothing is auto; None if nothing fits.

        ratio: as in `estimate`; most: the largest micro-batch; failed: what ran out of memory, so nothing that takes as
        much by the plan, and of its stage half its micro-batch at most.
        """
        able = choices(self.config, self.cluster.world())
        estimates = [self.estimate(each, ratio) for each in able if most is None or each.train.micro_batch <= most]
        fitting = [each for each in estimates if each.fits]
        if failed is not None:
            taken = self.estimate(failed, ratio).memory.total_bytes
            stage, half = failed.parallel.zero_stage, failed.train.micro_batch // 2
            fitting = [
                each
                for each in fitting
                if each.memory.total_bytes < taken
                and (each.config.parallel.zero_stage != stage or each.config.train.micro_batch <= half)
            ]
        return preferred(fitting, "train.micro_batch" in auto_keys(self.config))

    def smallest(self) -> Estimate:
        """Of what `auto` can come to, that which takes the least memory."""
        able = choices(self.config, self.cluster.world())
        return min(map(self.estimate, able), key=lambda each: each.memory.total_bytes)

    def fastest(self, now: Estimate | None = None, ratio: float = 1.0, most: int | None = None) -> Estimate | None:
        """The stage, micro-batch and checkpointing by which this global batch goes fastest; None if none fits.

        Where two are within 2%, `now`, else that of the lower stage, without checkpointing, and with more memory to
        spare. ratio: as in `estimate`; most: the largest micro-batch without more checkpointing than the config's.
        """
        own = CHECKPOINTING.index(self.config.train.gradient_checkpointing)
        able = [
            each
            for each in self._choices()
            if most is None
            or each.train.micro_batch <= most
            or CHECKPOINTING.index(each.train.gradient_checkpointing) > own
        ]
        fitting = [each for each in (self.estimate(one, ratio) for one in able) if each.fits]
        if not fitting:
            return None
        fast = _ALIKE * max(each.images_per_second for each in fitting)
        if now is not None and now.fits and now.images_per_second >= fast:
            return now

        def rank(each: Estimate) -> tuple[int, int, int]:
            config = each.config
            return (
                config.parallel.zero_stage,
                CHECKPOINTING.index(config.train.gradient_checkpointing),
                each.memory.total_bytes,
            )

        return min((each for each in fitting if each.images_per_second >= fast), key=rank)

    def _choices(self) -> Iterator[RunConfig]:
        for again in (False,) if self.config.train.cuda_graphs else CHECKPOINTING:
            free = with_step(self.config, AUTO, AUTO)
            yield from choices(
                replace(free, train=replace(free.train, gradient_checkpointing=again)), self.cluster.world()
            )


def preferred(fitting: Sequence[Estimate], by_speed: bool) -> Estimate | None:
    """Of the lowest stage the smallest micro-batch that goes as fast as any; None of nothing.

    by_speed: whether a stage that fits only micro-batches by which steps are much slower is left out.
    """
    if not fitting:
        return None
    enough = _NEAR * max(each.images_per_second for each in fitting) if by_speed else 0.0
    stage = min(each.config.parallel.zero_stage for each in fitting if each.images_per_second >= enough)
    alike = [each for each in fitting if each.config.parallel.zero_stage == stage]
    fast = _ALIKE * max(each.images_per_second for each in alike)
    return min(
        (each for each in alike if each.images_per_second >= fast), key=lambda each: each.config.train.micro_batch
    )


def scaling(planner: Planner, config: RunConfig) -> list[dict[str, Any]]:
    """The same global batch on numbers of GPUs that divide it: 1 to a node's, nodes doubled, and that asked for."""
    cluster, batch = planner.cluster, config.train.global_batch
    nodes = _doubled(max(_NODES, cluster.nodes))
    numbers = {*_doubled(cluster.a_node), *(cluster.a_node * each for each in nodes), cluster.gpus}
    shared = [number for number in sorted(numbers) if batch % number == 0]
    return [{"gpus": number} | _point(planner, config, replace(cluster, gpus=number)) for number in shared]


def _doubled(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def _point(planner: Planner, config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """By the fastest micro-batch that fits; nothing of one where none does, or where the config's own rules refuse."""
    none: dict[str, Any] = {"images_per_second": None, "micro_batch": None, "accumulation": None, "refused": None}
    try:
        able = choices(with_step(config, config.parallel.zero_stage, AUTO), cluster.world())
    except ConfigError as refusal:
        return none | {"refused": str(refusal)}
    fitting = [each for each in (planner.estimate(one, cluster=cluster) for one in able) if each.fits]
    if not fitting:
        return none
    best = max(fitting, key=lambda each: each.images_per_second)
    return none | {
        "images_per_second": best.images_per_second,
        "micro_batch": best.config.train.micro_batch,
        "accumulation": accumulation(best.config, cluster.world()),
    }


def plan(planner: Planner, images: int | None = None, image_kb: float = 110.0) -> dict[str, Any]:
    """All of it, as `--json` prints it. images: of the data set, for train.epochs; image_kb: of one, compressed."""
    cluster = planner.cluster
    world, gpu = cluster.world(), cluster.gpu
    now = planner.choice() or planner.smallest()
    fastest = planner.fastest(now)
    config = now.config
    counted = activations(config, world.device)
    rate, micro = now.images_per_second, config.train.micro_batch
    by_part = {name: round(each.peak * micro) for name, each in counted.an_image.items()}
    return {
        "gpu": gpu.name,
        "gpu_source": gpu.source,
        "link_gb_s": gpu.link_gb_s,
        "network_gb_s": cluster.network / 1e9,
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "objective": config.objective.name,
        "parameters": planner.count.all,
        "trained_parameters": planner.count.trained,
        "flops_per_image": planner.flops.total,
        "auto": auto_keys(planner.config),
        **_settings(config, world),
        "fits": now.fits,
        "memory": asdict(now.memory)
        | {"allocated_bytes": now.memory.allocated_bytes, "total_bytes": now.memory.total_bytes}
        | {"of_bytes": gpu.memory, "activations_by_part": by_part | {"fixed": round(counted.fixed.peak)}}
        | {"not_counted": ["what train.cuda_graphs keeps for its graphs"] if config.train.cuda_graphs else []},
        "step_seconds": asdict(now.step) | {"total": now.step.total, "bound_by": now.step.bound_by},
        "not_measured": [_GRAPHS] if config.train.cuda_graphs else [],
        "offload": _offload(planner, config),
        "images_per_second": rate,
        "mfu": rate * planner.flops.total / (cluster.gpus * gpu.flops(config.train.precision)),
        "fastest": None if fastest is None else _settings(fastest.config, world)
        | {"images_per_second": fastest.images_per_second, "total_bytes": fastest.memory.total_bytes}
        | {"largest_micro_batch": _largest(planner, fastest.config)}
        | {"keys": as_keys(_settings(fastest.config, world)), "is_this": fastest is now},
        "run": _run(planner, rate, images),
        "loader": {
            "cores_a_node": rate / cluster.nodes * image_kb * _CORE_S_A_KB,
            "bytes_per_second_a_node": rate / cluster.nodes * image_kb * 1e3,
        },
        "checkpoint": _checkpoint(planner, now),
        "scaling": scaling(planner, config),
    }  # fmt: skip


def _largest(planner: Planner, config: RunConfig) -> int:
    """The largest micro-batch that fits with this one's stage and checkpointing."""
    able = choices(with_step(config, config.parallel.zero_stage, AUTO), planner.cluster.world())
    return max(each.train.micro_batch for each in able if planner.estimate(each).fits)


def _offload(planner: Planner, config: RunConfig) -> dict[str, Any] | None:
    """The host's memory that parallel.offload_optimizer takes."""
    if not config.parallel.offload_optimizer:
        return None
    world = planner.cluster.world()
    rank = host_bytes(config, world, planner.count)
    return {"host_bytes_a_rank": rank, "host_bytes_a_node": rank * world.local_world_size}


def _settings(config: RunConfig, world: World) -> dict[str, Any]:
    return {
        "zero_stage": config.parallel.zero_stage,
        "micro_batch": config.train.micro_batch,
        "accumulation": accumulation(config, world),
        "gradient_checkpointing": config.train.gradient_checkpointing,
    }


def _run(planner: Planner, rate: float, images: int | None) -> dict[str, Any]:
    """Hours and cost to the end of the recipe; what is missing where its epochs are of unknown length."""
    train, cluster = planner.config.train, planner.cluster
    steps = steps_or_missing(planner.config, images)
    if isinstance(steps, str):
        return {"steps": None, "missing": steps}
    hours = steps * train.global_batch / rate / 3600
    cost = None if cluster.price is None else hours * cluster.gpus * cluster.price
    return {"steps": steps, "hours": hours, "gpu_hours": hours * cluster.gpus, "cost": cost}


def _checkpoint(planner: Planner, now: Estimate) -> dict[str, Any]:
    """Size and time of a save, how often to save, and what a failure costs."""
    config, cluster = planner.config, planner.cluster
    count = planner.count
    size = 4 * (count.all + count.trained * (2 if config.train.ema_decay is None else 3))
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


def advice(config: RunConfig, world: World, room: int, ratio: float = 1.0, most: int | None = None) -> str:
    """What to set so that this config fits into so many bytes on each rank, as the end of a sentence.

    room: where it has run out of memory, no more than is less than it takes by the plan; ratio, most: as in
    `Planner.fastest`.
    """
    cluster, words = Cluster.of(world, room), "by `vitscale plan` this fits, and is the fastest: "
    best = Planner(config, cluster).fastest(ratio=ratio, most=most)
    if best is None and world.device == "cuda":
        parallel = replace(config.parallel, zero_stage=AUTO, offload_optimizer=True)
        words = "by `vitscale plan` this fits, with Adam's state and step on the CPU: parallel.offload_optimizer=true "
        best = Planner(replace(config, parallel=parallel), cluster).fastest(ratio=ratio, most=most)
    if best is None:
        more = "not with parallel.offload_optimizer either: take larger or more GPUs"
        if world.device != "cuda":
            more = "not with gradient checkpointing either: take more memory, or more machines"
        return f"by `vitscale plan` no ZeRO stage fits, {more}"
    return words + as_keys(_settings(best.config, world))


def as_keys(settings: dict[str, Any]) -> str:
    """Settings as words of the command line."""
    return (
        f"parallel.zero_stage={settings['zero_stage']} train.micro_batch={settings['micro_batch']} "
        f"train.gradient_checkpointing={str(settings['gradient_checkpointing']).lower()}"
    )
