"""How long a step takes on a GPU: a roofline whose constants come from one card's steps.

A GPU's time is that of the matrix products at the measured rate, that of moving what a step makes, and that of the
optimizer's state; it is no shorter than what the host needs to start the kernels. docs/measurements.md has how far the
six steps that the constants come from are off. Communication is a model that no cluster has confirmed yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitscale.config.schema import RunConfig
from vitscale.config.step import accumulation
from vitscale.planning.gpus import Gpu
from vitscale.planning.memory import StepCount
from vitscale.world import World

# Fitted to ViT-B, L and H on one H200, MAE and classification, compiled blocks (docs/measurements.md).
_PASSES = 3.2  # over each byte that a step makes, fused operations taken into account
_HOST_S, _HOST_GRAPHS_S = 3.1e-3, 1.85e-3  # of a block, forward and backward; by train.cuda_graphs
_HOST_STAGE_3 = 2.4  # times DDP's, by `vitscale bench zero` on a CPU
_EAGER = 1.3  # eager against compiled blocks, on the GPU and on the host
_OPTIMIZER_BYTES = 28  # a parameter: weight, gradient and two moments read, three of them written
_FP32 = 1 / 15  # of bf16's rate: fp32 is not TF32 here
_HIDDEN = 2 / 3  # of the GPU's time, the backward, hides communication
_LINK_SHARE = 0.8  # of a link's rate that collectives reach


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of an optimizer step on each rank, by what they are spent on."""

    matrix: float
    traffic: float  # of activations and gradients between the GPU and its memory
    optimizer: float
    host: float  # in which kernels are started, beside the three above
    communication: float  # beside all of them
    exposed: float  # of communication: what the backward does not hide

    @property
    def device(self) -> float:
        return self.matrix + self.traffic + self.optimizer

    @property
    def total(self) -> float:
        return max(self.device, self.host) + self.exposed

    @property
    def bound_by(self) -> str:
        if self.exposed > max(self.device, self.host):
            return "communication"
        if self.host > self.device:
            return "the host"
        return "matrix products" if self.matrix > self.traffic else "the GPU's memory"


def step_seconds(
    config: RunConfig, world: World, gpu: Gpu, count: int, flops: int, step: StepCount, network: float
) -> StepSeconds:
    """count: parameters; flops: of training on an image, recomputation not included; step: of a micro-batch; network:
    bytes a second of a node to the others, in each direction."""
    train, stage, ranks = config.train, config.parallel.zero_stage, world.world_size
    forwards, images = accumulation(config, world), train.global_batch / ranks
    eager = 1.0 if train.compile else _EAGER
    again = 4 / 3 if train.gradient_checkpointing else 1.0  # `made` has it already
    products = again if train.gradient_checkpointing is True else 1.0
    rate = gpu.flops * (1.0 if train.precision == "bf16" else _FP32)
    decoder = config.objective.mae.decoder_num_hidden_layers if config.objective.name == "mae" else 0
    blocks = config.model.num_hidden_layers + decoder
    matrix = images * flops * products / rate
    traffic = forwards * eager * _PASSES * step.made / gpu.bandwidth
    optimizer = _OPTIMIZER_BYTES * (count / ranks if stage else count) / gpu.bandwidth
    host = forwards * blocks * again * eager * (_HOST_GRAPHS_S if train.cuda_graphs else _HOST_S)
    host *= _HOST_STAGE_3 if stage == 3 else 1.0
    link = gpu.link_gb_s * 1e9 * _LINK_SHARE
    if ranks > world.local_world_size:
        link = min(link, network * _LINK_SHARE)  # a node's GPUs have a ring each, which share its adapters
    communication = _communicated(config, count, ranks, forwards) / link
    exposed = max(0.0, communication - _HIDDEN * max(matrix + traffic + optimizer, host))
    return StepSeconds(matrix, traffic, optimizer, host, communication, exposed)


def _communicated(config: RunConfig, count: int, ranks: int, forwards: int) -> float:
    """Bytes that a rank sends in a step, by ring algorithms."""
    stage, others = config.parallel.zero_stage, (ranks - 1) / ranks
    weight = 2 if config.train.precision == "bf16" and stage else 4
    gradient = 4 if config.parallel.reduce_dtype == "fp32" else 2
    if stage == 0:
        return 2 * others * gradient * count
    if stage < 3:
        return others * (2 * gradient + weight) * count
    return forwards * others * (2 * weight + gradient) * count
