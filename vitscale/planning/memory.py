"""The memory of a training step on one GPU, by part, from the model's own forward and backward on fake tensors.

A step is counted at depths of one and two blocks and at two micro-batches, operation by operation; what a block and
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
from vitscale.config.schema import Model, Objective, Parallel, RunConfig, Train
from vitscale.config.step import accumulation
from vitscale.engine.room import CONTEXT
from vitscale.models.auto import build_model
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.planning.live import LiveBytes
from vitscale.world import World

_SMALL, _LARGE = 8, 16  # micro-batches that are counted
_SLACK = 0.06  # of what is allocated: what the allocator holds and cannot give out
_STAGE_3_LIVE = 1_000_000_000  # parameters that DeepSpeed keeps gathered at most (stage3_max_live_parameters)


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
    """What a step of any micro-batch makes, as `fixed` and `an_image` by part of the model: start and end, encoder,
    decoder."""

    fixed: StepCount
    an_image: dict[str, StepCount]

    def of(self, images: int) -> StepCount:
        total = self.fixed
        for each in self.an_image.values():
            total = total.plus(each.times(images))
        return total


def activations(config: RunConfig) -> Activations:
    """Counted on fake tensors: no data, no memory, no GPU."""
    train = config.train
    # Stages 1 to 3 are alike, and only bf16 tells them from 0.
    stage = min(config.parallel.zero_stage, 1) if train.precision == "bf16" else 0
    kept = Train(precision=train.precision, gradient_checkpointing=train.gradient_checkpointing)
    return _counted(RunConfig(model=config.model, objective=config.objective, train=kept, parallel=Parallel(stage)))


@cache
def _counted(config: RunConfig) -> Activations:
    """Of a config with nothing in it that does not decide them."""
    depths = _depths(config)
    at = {images: {name: _count(_with_depths(config, {name: 2}), images) for name in depths} | {
        "": _count(_with_depths(config, {}), images)} for images in (_SMALL, _LARGE)}  # fmt: skip

    def whole(images: int) -> dict[str, StepCount]:
        blocks = {name: at[images][name].minus(at[images][""]) for name in depths}
        ends = at[images][""]
        for block in blocks.values():
            ends = ends.minus(block)
        return {"start and end": ends} | {name: blocks[name].times(depth) for name, depth in depths.items()}

    small, large = whole(_SMALL), whole(_LARGE)
    an_image = {name: large[name].minus(small[name]).times(1 / (_LARGE - _SMALL)) for name in small}
    fixed = _NOTHING
    for name in small:
        fixed = fixed.plus(small[name].minus(an_image[name].times(_SMALL)))
    return Activations(fixed, an_image)


def _depths(config: RunConfig) -> dict[str, int]:
    """Blocks by the part of the model that has them."""
    decoder = {"decoder": config.objective.mae.decoder_num_hidden_layers} if config.objective.name == "mae" else {}
    return {"encoder": config.model.num_hidden_layers, **decoder}


def _with_depths(config: RunConfig, depths: dict[str, int]) -> RunConfig:
    """The same model with so many blocks in each part, one where none is said."""
    mae = replace(config.objective.mae, decoder_num_hidden_layers=depths.get("decoder", 1))
    model = replace(config.model, num_hidden_layers=depths.get("encoder", 1))
    return replace(config, model=model, objective=replace(config.objective, mae=mae))


def _count(config: RunConfig, images: int) -> StepCount:
    """One forward and backward of the model, whose gradients go as they come."""
    before = torch.autograd.is_multithreading_enabled()
    torch.autograd.set_multithreading_enabled(False)  # else the backward is in a thread, where nobody counts
    try:
        with FakeTensorMode(), LiveBytes() as live:
            model = lone_model(config)
            if config.train.gradient_checkpointing:
                model.gradient_checkpointing_enable(selective=config.train.gradient_checkpointing == "selective")
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
    masters: int  # fp32 weights of which these are copies
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


def parameters(config: RunConfig) -> int:
    """Of the whole model."""
    with torch.device("meta"):
        model: ViTPreTrainedModel = build_model(config)
    return sum(parameter.numel() for parameter in model.parameters())


def memory(config: RunConfig, world: World, count: int, step: StepCount) -> Memory:
    """Of a rank of `world`. count: parameters; step: of train.micro_batch."""
    stage, bf16 = config.parallel.zero_stage, config.train.precision == "bf16"
    offloads = config.parallel.offload_optimizer
    share = count / world.world_size if stage else float(count)
    own = 0.0 if offloads else share  # of what the optimizer holds
    used = 2 if bf16 and stage else 4  # bytes of a weight in a forward
    summed = 4 if accumulation(config, world) > 1 else used  # and of a gradient
    bucket = 4.0 * min(config.parallel.bucket_elements, count) if stage else 0.0
    height, width = _sides(config)
    parts = {
        "weights": used * (share if stage == 3 else count),
        "masters": 4 * own if bf16 and stage else 0.0,
        # At stage 0 they lie in DDP's buckets; at stage 1 those of several micro-batches are summed whole.
        "gradients": summed * (count if stage == 1 and summed > used else share),
        "moments": 8 * own,
        "ema": 0.0 if config.train.ema_decay is None else 4 * own,
        "inputs": 8.0 * config.train.micro_batch * config.model.num_channels * height * width,
    }
    forward = step.peak + (used * min(count, _STAGE_3_LIVE) if stage == 3 and world.world_size > 1 else 0)
    on_gpu = world.device == "cuda"  # where AdamW is fused, and steps in place
    temporaries = 0.0 if on_gpu or offloads else 8 * (share if stage else _largest(config.model, config.objective))
    exact = 4 * own if bf16 and stage and (stage == 3 or summed == used) else 0.0  # gradients in fp32
    # Most is in use when the backward begins, when it ends, or while the optimizer steps.
    begins = {"activations": forward, "buckets": bucket}
    if stage in (1, 2) and summed == used:
        begins["gradients"] = 0.0  # their memory is made as they come
    ends = {"activations": 0.0, "buckets": bucket * (1 + used / 4)}
    update = {"activations": 0.0, "buckets": (bucket if stage == 3 else 0.0) + temporaries + exact}
    parts = max((parts | moment for moment in (begins, ends, update)), key=lambda each: sum(each.values()))
    parts["slack"] = CONTEXT * on_gpu + _SLACK * sum(parts.values())
    return Memory(**{name: round(value) for name, value in parts.items()})


@cache
def _largest(model: Model, objective: Objective) -> int:
    with torch.device("meta"):
        built: ViTPreTrainedModel = build_model(RunConfig(model=model, objective=objective))
    return max(parameter.numel() for parameter in built.parameters())
