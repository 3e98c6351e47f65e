"""How long a step takes on a GPU: a roofline whose constants come from one card's steps.

A GPU's time is that of the matrix products at the measured rate, that of moving what a step makes, and that of the
optimizer's state; it is no shorter than what the host needs to start the kernels. To the larger of the two comes the
augmentation of the next images: the one run that was fed took as much longer than the bare step, though that is on
another stream. docs/measurements.md has how far this run is off, and the six steps that the constants come from.
Communication, and an optimizer that is offloaded, are models that no machine has confirmed yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig
from vitscale.config.step import accumulation, bucket_elements
from vitscale.models.auto import build_model
from vitscale.planning.gpus import GPUS, Gpu
from vitscale.planning.memory import Parameters, StepCount, frozen_blocks
from vitscale.world import World

# Fitted to ViT-B, L and H on one H200, MAE and classification, compiled blocks (docs/measurements.md).
_PASSES = 3.2  # over each byte that a step makes, fused operations taken into account
_HOST_S, _HOST_GRAPHS_S = 3.1e-3, 1.85e-3  # of a block, forward and backward; by train.cuda_graphs
_HOST_STAGE_3 = 2.4  # times DDP's, by `vitscale bench zero` on a CPU
_EAGER = 1.3  # eager against compiled blocks, on the GPU and on the host
_OPTIMIZER_BYTES = 28  # a parameter: weight, gradient and two moments read, three of them written
# Images/s that one H200 makes of photographs of 500x375, 224x224 each (docs/measurements.md, stage f): by
# augment.preset=mae, deit3 and randaug, from memory that is not pinned, the last two whole: a run's take less.
_CROPPED, _COLOURED, _RAND_AUGMENTED, _PIXELS = 17_018, 8_963, 6_788, 224 * 224
_LINK_SHARE = 0.8  # of a link's rate that collectives reach
_DDP_BUCKET = 25 * 2**20 // 4  # elements, torch's
# Reckoned, not measured: AdamW on the host, 8 bytes to clip a gradient and 6 to make the weight that goes back; and a
# GPU's part of its node's memory, an eighth of two thirds of 16 channels of DDR5-4800.
_HOST_OPTIMIZER_BYTES, _HOST_BANDWIDTH = _OPTIMIZER_BYTES + 8 + 6, 50e9


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of an optimizer step on each rank, by what they are spent on."""

    matrix: float
    traffic: float  # of activations and gradients between the GPU and its memory
    optimizer: float  # on the GPU
    host: float  # in which kernels are started, beside the three above
    augment: float  # of the next step's images
    offload: float  # the optimizer on the host, and gradients and weights on their way: nothing runs beside it
    communication: float  # beside all of them
    exposed: float  # of communication: what nothing hides

    @property
    def device(self) -> float:
        return self.matrix + self.traffic + self.optimizer

    @property
    def total(self) -> float:
        return max(self.device, self.host) + self.augment + self.offload + self.exposed

    @property
    def bound_by(self) -> str:
        parts = {
            "communication": self.exposed,
            "the optimizer on the host": self.offload,
            "the host": self.host,
            "augmentation": self.augment,
        }
        most = max(parts, key=lambda name: parts[name])
        if parts[most] > self.device:
            return most
        return "matrix products" if self.matrix > self.traffic else "the GPU's memory"


@dataclass(frozen=True)
class Flops:
    """Of an image, recomputation not included."""

    forward: int
    backward: int  # frozen blocks have none

    @property
    def total(self) -> int:
        return self.forward + self.backward


def flops(config: RunConfig) -> Flops:
    """Of training on an image."""
    blocks = config.model.num_hidden_layers
    forward, one_more = (_forward_flops(config, count) for count in (blocks, blocks + 1))
    trained = forward - frozen_blocks(config) * (one_more - forward)
    return Flops(forward, 2 * trained)


def _forward_flops(config: RunConfig, blocks: int) -> int:
    with torch.device("meta"):
        model = build_model(replace(config, model=replace(config.model, num_hidden_layers=blocks)))
    return model.forward_flops()


def step_seconds(
    config: RunConfig, world: World, gpu: Gpu, count: Parameters, image: Flops, step: StepCount, network: float
) -> StepSeconds:
    """image: what training on one takes; step: of a micro-batch; network: bytes a second of a node to the others, in
    each direction."""
    train, stage, ranks = config.train, config.parallel.zero_stage, world.world_size
    forwards, images = accumulation(config, world), train.global_batch / ranks
    eager = 1.0 if train.compile else _EAGER
    again = image.backward / 2 if train.gradient_checkpointing else 0.0  # run in the backward; `made` has it already
    products = image.total + (again if train.gradient_checkpointing is True else 0.0)
    decoder = config.objective.mae.decoder_num_hidden_layers if config.objective.name == "mae" else 0
    blocks = (config.model.num_hidden_layers + decoder) * (image.total + again) / (3 * image.forward)  # run as a whole
    offloads = config.parallel.offload_optimizer
    own = count.trained / ranks if stage else count.trained
    matrix = gpu.step_ratio * images * products / gpu.flops(train.precision)
    traffic = gpu.step_ratio * forwards * eager * _PASSES * step.made / gpu.bandwidth
    optimizer = 0.0 if offloads else gpu.step_ratio * _OPTIMIZER_BYTES * own / gpu.bandwidth
    augment = images * _augmentation(config, gpu)
    offload = _offloaded(config, own, forwards, gpu) if offloads else 0.0
    host = gpu.step_ratio * forwards * blocks * eager * (_HOST_GRAPHS_S if train.cuda_graphs else _HOST_S)
    host *= _HOST_STAGE_3 if stage == 3 else 1.0
    link = gpu.link_gb_s * 1e9 * _LINK_SHARE
    if ranks > world.local_world_size:
        link = min(link, network * _LINK_SHARE)  # a node's GPUs have a ring each, which share its adapters
    micro_batch = max(matrix + traffic, host) / forwards
    forward = micro_batch * image.forward / (image.total + again)
    exchange = _with_zero_3 if stage == 3 else _below_zero_3
    communication, exposed = exchange(config, count, ranks, forwards, link, forward, micro_batch - forward)
    return StepSeconds(matrix, traffic, optimizer, host, augment, offload, communication, exposed)


def _augmentation(config: RunConfig, gpu: Gpu) -> float:
    """Seconds of an image: of the slowest preset that has what is on, by the pixels made and the memory's rate."""
    section, rate = config.augment, _CROPPED
    if section.three_augment or any((*section.color_jitter, section.erase, section.mixup, section.cutmix)):
        rate = _COLOURED
    if section.rand_augment is not None or section.steps:
        rate = _RAND_AUGMENTED
    pixels = math.prod(pair(config.model.image_size))
    return pixels / _PIXELS / rate * GPUS["h200"].bandwidth / gpu.bandwidth


def _below_zero_3(
    config: RunConfig, count: Parameters, ranks: int, forwards: int, link: float, forward: float, backward: float
) -> tuple[float, float]:
    """Seconds of a step's communication, and of what is left of it, by ring algorithms.

    Gradients are summed beside the last micro-batch's backward, at stage 2 beside each one's, the last bucket after it;
    then, from stage 1 on, weights are gathered, with nothing beside.
    """
    stage, others = config.parallel.zero_stage, (ranks - 1) / ranks
    bucket = bucket_elements(config, count.trained) if stage else _DDP_BUCKET
    reduction = 2 * others * _sent(config) * count.trained / link
    left = max(reduction - backward, reduction * min(1.0, bucket / count.trained))
    times = forwards if stage == 2 else 1
    gathering = others * _weight(config) * count.trained / link if stage else 0.0
    return times * reduction + gathering, times * left + gathering


def _with_zero_3(
    config: RunConfig, count: Parameters, ranks: int, forwards: int, link: float, forward: float, backward: float
) -> tuple[float, float]:
    """As `_below_zero_3`. Each micro-batch gathers the weights ahead of the forward and again ahead of the backward,
    beside which gradients go to who has them, the last bucket after it."""
    others = (ranks - 1) / ranks
    gathering = others * _weight(config) * count.all / link
    reduction = others * _sent(config) * count.trained / link
    last = reduction * bucket_elements(config, count.trained) / count.trained
    left = max(0.0, gathering - forward) + max(gathering + reduction - backward, last)
    return forwards * (2 * gathering + reduction), forwards * left


def _weight(config: RunConfig) -> int:
    """Bytes of a weight in a forward."""
    return 2 if config.train.precision == "bf16" and config.parallel.zero_stage else 4


def _sent(config: RunConfig) -> int:
    """Bytes of a gradient on its way."""
    return 4 if config.parallel.reduce_dtype == "fp32" else 2


def _offloaded(config: RunConfig, own: float, forwards: int, gpu: Gpu) -> float:
    """Seconds for so many elements: gradients go to the host in fp32 and weights come back; then the step there.

    Micro-batches are summed on the GPU where the sums stay there, in bf16 at stages 1 and 2; else each but the first
    brings them up and down again.
    """
    stays = config.train.precision == "bf16" and config.parallel.zero_stage < 3
    moved = 4 * (1 if stays else 2 * forwards - 1) + _weight(config)
    return own * (moved / gpu.host_bandwidth + _HOST_OPTIMIZER_BYTES / _HOST_BANDWIDTH)
