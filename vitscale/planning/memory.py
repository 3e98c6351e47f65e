"""The memory of a training step on one GPU, by part, from the model's own forward and backward on fake tensors.

A step is counted at two depths of each kind of block and at two micro-batches, operation by operation; what a block and
an image add is the difference, so any model and any batch follow. The weights' and the optimizer's parts are
arithmetic: how DDP and DeepSpeed (0.19) lay them out, see engine/ddp.py and engine/zero.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitscale.config.check import has_classes
from vitscale.config.schema import Parallel, RunConfig, Train
from vitscale.config.step import LIVE_ELEMENTS, accumulation, bucket_elements
from vitscale.engine.room import CONTEXT
from vitscale.models.attention import attend_in_float32
from vitscale.models.auto import build_model
from vitscale.models.freezing import freeze
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.planning.live import LiveBytes
from vitscale.world import World

_SMALL, _LARGE = 8, 16  # micro-batches that are counted
_BLOCKS = {"frozen blocks": 2, "encoder": 1, "decoder": 1}  # and one more of each; a second frozen one is as any other
_SLACK = 0.06  # of what is allocated: what the allocator holds and cannot give out


@dataclass(frozen=True)
class StepCount:
    """Bytes of one micro-batch's forward and backward beside weights and gradients."""

    forward: float  # alive at once in the forward
    backward: float  # and in the backward
    made: float  # in all, recomputation included

    @property
    def peak(self) -> float:
        return max(self.forward, self.backward)

    def times(self, factor: float) -> StepCount:
        return StepCount(self.forward * factor, self.backward * factor, self.made * factor)

    def plus(self, other: StepCount) -> StepCount:
        return StepCount(self.forward + other.forward, self.backward + other.backward, self.made + other.made)

    def minus(self, other: StepCount) -> StepCount:
        return self.plus(other.times(-1.0))


_NOTHING = StepCount(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Activations:
    """What a step of any micro-batch makes, as `fixed` and `an_image` by part of the model: start and end, frozen
    blocks, encoder, decoder."""

    fixed: StepCount
    an_image: dict[str, StepCount]

    def of(self, images: int) -> StepCount:
        total = self.fixed
        for each in self.an_image.values():
            total = total.plus(each.times(images))
        return total


def activations(config: RunConfig, device: str) -> Activations:
    """On cuda or cpu, counted on fake tensors: no data, no memory, no GPU."""
    # Stages 1 to 3 are alike, and only bf16 tells them from 0.
    stage = min(config.parallel.zero_stage, 1) if config.train.precision == "bf16" else 0
    names = ("precision", "gradient_checkpointing", "freeze")
    train = Train(**{name: getattr(config.train, name) for name in names})
    kept = RunConfig(model=config.model, objective=config.objective, train=train, parallel=Parallel(stage))
    return _counted(kept, device)


@cache
def _counted(config: RunConfig, device: str) -> Activations:
    """Of a config with nothing in it that does not decide them."""
    depths = _depths(config)
    at = {images: {name: _count(_with_depths(config, {name: _BLOCKS[name] + 1}), device, images) for name in depths} | {
        "": _count(_with_depths(config, {}), device, images)} for images in (_SMALL, _LARGE)}  # fmt: skip

    def whole(images: int) -> dict[str, StepCount]:
        blocks = {name: at[images][name].minus(at[images][""]) for name in depths}
        ends = at[images][""]
        for name, block in blocks.items():
            ends = ends.minus(block.times(_BLOCKS[name]))
        return {"start and end": ends} | {name: blocks[name].times(depth) for name, depth in depths.items()}

    small, large = whole(_SMALL), whole(_LARGE)
    an_image = {name: large[name].minus(small[name]).times(1 / (_LARGE - _SMALL)) for name in small}
    fixed = _NOTHING
    for name in small:
        fixed = fixed.plus(small[name].minus(an_image[name].times(_SMALL)))
    return Activations(fixed, an_image)


def _depths(config: RunConfig) -> dict[str, int]:
    """Blocks by the part of the model that has them."""
    blocks, frozen = config.model.num_hidden_layers, frozen_blocks(config)
    decoder = config.objective.mae.decoder_num_hidden_layers if config.objective.name == "mae" else 0
    depths = {"frozen blocks": frozen, "encoder": blocks - frozen, "decoder": decoder}
    return {name: depth for name, depth in depths.items() if depth}


def frozen_blocks(config: RunConfig) -> int:
    """Blocks of the encoder that train.freeze leaves as they are."""
    freeze = config.train.freeze
    return config.model.num_hidden_layers if freeze < 0 else freeze


def _with_depths(config: RunConfig, depths: dict[str, int]) -> RunConfig:
    """The same model with so many blocks in each part that it has, those of _BLOCKS where none is said."""
    depths = {name: _BLOCKS[name] for name in _depths(config)} | depths
    frozen = depths.get("frozen blocks", 0)
    mae = replace(config.objective.mae, decoder_num_hidden_layers=depths.get("decoder", 1))
    model = replace(config.model, num_hidden_layers=frozen + depths.get("encoder", 0))
    train = replace(config.train, freeze=min(config.train.freeze, frozen))  # -1 stays what it is
    return replace(config, model=model, objective=replace(config.objective, mae=mae), train=train)


def _count(config: RunConfig, device: str, images: int) -> StepCount:
    """One forward and backward of the model, whose gradients go as they come."""
    before = torch.autograd.is_multithreading_enabled()
    torch.autograd.set_multithreading_enabled(False)  # else the backward is in a thread, where nobody counts
    try:
        with FakeTensorMode(), LiveBytes() as live:
            model = lone_model(config)
            if config.train.gradient_checkpointing:
                model.gradient_checkpointing_enable(selective=config.train.gradient_checkpointing == "selective")
            if device == "cpu" and config.train.precision == "bf16":
                attend_in_float32(model)
            model.train()
            held = live.live
            live.start_again()
            output = lone_forward(config, model, images)
            forward = live.peak
            live.peak = live.live
            output[0].loss.backward()  # the engine too has all of the output until then
            return StepCount(forward - held, live.peak - held, live.made)
    finally:
        torch.autograd.set_multithreading_enabled(before)


def lone_model(config: RunConfig) -> ViTPreTrainedModel:
    """The model with weights as an engine of the config's stage has them, whose gradients go as they come; on the
    device that is torch's default."""
    model: ViTPreTrainedModel = build_model(config)
    freeze(model, config.train.freeze)
    if config.train.precision == "bf16" and config.parallel.zero_stage > 0:
        _to_bf16(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    return model


def lone_forward(config: RunConfig, model: nn.Module, images: int) -> tuple[Any, list[Tensor]]:
    """The output for so many images, and the copies of it that an engine makes."""
    autocasts = config.train.precision == "bf16" and config.parallel.zero_stage == 0
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in _inputs(config, images).items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts):
        output = model(**inputs)
    # accelerate gives outputs of its autocast in fp32 too
    return output, [each.float() for each in output.values() if isinstance(each, Tensor)]


def _to_bf16(model: nn.Module) -> None:
    """As DeepSpeed does; torch's own way does not work on fake tensors."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            half = parameter.detach().to(torch.bfloat16)
            setattr(module, name, nn.Parameter(half, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(torch.bfloat16) if buffer.is_floating_point() else buffer)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _inputs(config: RunConfig, images: int) -> dict[str, Any]:
    height, width = _sides(config)
    inputs = {"pixel_values": torch.ones(images, config.model.num_channels, height, width)}
    inputs["sample_key"] = torch.arange(images)
    if config.objective.needs_labels:
        single = has_classes(config)
        inputs["labels"] = (
            torch.zeros(images, dtype=torch.long) if single else torch.zeros(images, config.model.num_labels)
        )
    return inputs


def _sides(config: RunConfig) -> tuple[int, int]:
    size = config.model.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, at the moment of a step at which most are in use."""

    weights: int  # that forwards use; at stage 3 this rank's share
    masters: int  # fp32 weights that DeepSpeed steps, beside those that forwards use
    gradients: int
    moments: int
    ema: int
    buckets: int  # in which gradients are reduced, or what the optimizer's step needs for a moment
    activations: int  # at stage 3 with the weights that are gathered
    inputs: int  # this batch is in the activations; the next one, and its crops
    slack: int  # on a GPU CUDA's own, and what the allocator cannot give out

    @property
    def allocated_bytes(self) -> int:
        """As torch.cuda.max_memory_allocated tells it."""
        return self.total_bytes - self.slack

    @property
    def total_bytes(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Parameters:
    """How many a model has."""

    all: int
    trained: int  # the others are frozen
    largest: int  # of a tensor that is trained


def parameters(config: RunConfig) -> Parameters:
    """Of the whole model."""
    with torch.device("meta"):
        model: ViTPreTrainedModel = build_model(config)
    freeze(model, config.train.freeze)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return Parameters(model.num_parameters(), sum(trained), max(trained))


def memory(config: RunConfig, world: World, count: Parameters, step: StepCount) -> Memory:
    """Of a rank of `world`. step: of train.micro_batch."""
    stage, bf16, ranks = config.parallel.zero_stage, config.train.precision == "bf16", world.world_size
    used = 2 if bf16 and stage else 4  # bytes of a weight in a forward
    own = _own(config, world, count)
    frozen = (count.all - count.trained) / ranks if world.device == "cpu" else 0.0  # exact values, in the host's memory
    height, width = _sides(config)
    parts = {
        "weights": used * (count.all / ranks if stage == 3 else count.all),
        "masters": 4 * (own + frozen) if stage else 0.0,
        "moments": 8 * own,
        "ema": 0.0 if config.train.ema_decay is None else 4 * own,
        "inputs": 8.0 * config.train.micro_batch * config.model.num_channels * height * width,
    }
    moments = {0: _with_ddp, 1: _with_zero, 2: _with_zero, 3: _with_zero_3}[stage](config, world, count, step.peak)
    parts = max((parts | each for each in moments), key=lambda each: sum(each.values()))
    parts["slack"] = CONTEXT * (world.device == "cuda") + _SLACK * sum(parts.values())
    return Memory(**{name: round(value) for name, value in parts.items()})


def host_bytes(config: RunConfig, world: World, count: Parameters) -> int:
    """What parallel.offload_optimizer takes of the host's memory, a rank: masters, moments, gradients in fp32, and the
    weights or, at stage 3, the gradients on their way."""
    each = 4 + 8 + 4 + (2 if config.train.precision == "bf16" else 4) + (0 if config.train.ema_decay is None else 4)
    return round(each * count.trained / world.world_size)


def _own(config: RunConfig, world: World, count: Parameters) -> float:
    """Parameters whose state the optimizer keeps in this memory, not in the host's beside it."""
    if config.parallel.offload_optimizer and world.device == "cuda":
        return 0.0
    return count.trained / world.world_size if config.parallel.zero_stage else float(count.trained)


# What follows gives the moments of a step at which most may be in use: when the backward begins, when the first bucket
# is full or the backward has ended, and while the optimizer steps. peak: of the activations.


def _moment(activations: float, gradients: float, buckets: float) -> dict[str, float]:
    return {"activations": activations, "gradients": gradients, "buckets": buckets}


def _with_ddp(_: RunConfig, __: World, count: Parameters, peak: float) -> list[dict[str, float]]:
    """DDP's buckets are the gradients, for good, on one rank too."""
    return [_moment(peak, 4.0 * count.trained, 0)]


def _with_zero(config: RunConfig, world: World, count: Parameters, peak: float) -> list[dict[str, float]]:
    """Stages 1 and 2 (DeepSpeed's stage_1_and_2.py): buffers of the weights' type, two where they overlap, from the
    backward's first gradient on, which a bucket's gradients wait for; then copies of it, to be summed over ranks; a
    rank's own gradients, of whose memory all is made at once."""
    stage, ranks, several = config.parallel.zero_stage, world.world_size, accumulation(config, world) > 1
    overlaps = world.device == "cuda"
    used, sent = 2 if config.train.precision == "bf16" else 4, 4 if config.parallel.reduce_dtype == "fp32" else 2
    bucket, share, own = bucket_elements(config, count.trained), count.trained / ranks, _own(config, world, count)
    in_fp32 = several and used == 2  # summed as they come, in the memory that the optimizer reads
    buffers = used * bucket * (2 if overlaps else 1)
    copies = bucket * (used * (ranks > 1 or in_fp32) + sent * (sent != used))
    waiting = used * (bucket if own else count.largest)
    kept = 4 * share if in_fp32 else used * own
    held = kept if several else 0.0  # of the micro-batches before
    left = peak * (1 - bucket / count.trained)  # of the activations, once a bucket is full
    first = kept if in_fp32 else held + kept
    if stage == 1 and (several or not overlaps):  # nothing is reduced before the last backward, or its end
        held = float(used * count.trained) if several else 0.0
        left, first = left * overlaps, used * (count.trained - bucket) + kept
    flat = 0.0 if in_fp32 else 4 * own
    step = flat + used * own * (flat > 0 and used == 2)
    return [_moment(peak, held, buffers), _moment(left, first, buffers + max(waiting, copies)), _moment(0, kept, step)]


def _with_zero_3(config: RunConfig, world: World, count: Parameters, peak: float) -> list[dict[str, float]]:
    """Stage 3 (stage3.py): one buffer of the type that is summed, and a rank's own gradients, for good."""
    used, sent = 2 if config.train.precision == "bf16" else 4, 4 if config.parallel.reduce_dtype == "fp32" else 2
    bucket, own = bucket_elements(config, count.trained), _own(config, world, count)
    summed = 4 if accumulation(config, world) > 1 else used
    buffer = float(sent * bucket)
    copies = bucket * (sent + summed * (summed != sent) / world.world_size)
    flat = 4 * own + summed * own * (summed == 2)
    gathered = used * min(count.all, LIVE_ELEMENTS) if world.world_size > 1 else 0
    left = gathered + peak * (1 - bucket / count.trained)
    at = [(gathered + peak, buffer), (left, buffer + copies), (0, buffer + flat)]
    return [_moment(activations, summed * own, buckets) for activations, buckets in at]
