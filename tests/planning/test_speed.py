"""How long a step is said to take: what is reckoned with by the data sheets, and what hides what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vitscale.bench.peers import run_config
from vitscale.config.augmentation import PRESETS, Augmentation, Step
from vitscale.config.schema import Parallel, RunConfig, Train
from vitscale.planning.gpus import GPUS, HOST_SHARE, Gpu
from vitscale.planning.memory import Parameters, StepCount
from vitscale.planning.speed import Flops, StepSeconds, flops, step_seconds
from vitscale.world import World

COUNT = Parameters(100_000_000, 100_000_000, 5_000_000)
IMAGE = Flops(30_000_000_000, 60_000_000_000)
LINK = 0.8 * 450e9


def config_of(
    stage: int, micro: int = 64, ranks: int = 8, parallel: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    keys: dict[str, Any] = {"precision": "bf16", "compile": True, "micro_batch": micro, "global_batch": 64 * ranks}
    config = run_config("B", "classification")
    return replace(config, train=Train(**keys | train), parallel=Parallel(zero_stage=stage, **parallel or {}))


def step_of(config: RunConfig, ranks: int = 8, gpu: Gpu = GPUS["h100"]) -> StepSeconds:
    made = 1e9 * config.train.micro_batch / 64
    world = World(world_size=ranks, local_world_size=8, device="cuda")
    return step_seconds(config, world, gpu, COUNT, IMAGE, StepCount(0.0, 0.0, made), 400e9)


def test_bytes_that_a_step_sends() -> None:
    """By rings of 8: gradients in fp32, there and back; at ZeRO 2 those of every micro-batch."""

    def seconds(stage: int, micro: int = 64) -> float:
        return step_of(config_of(stage, micro)).communication * LINK / (7 / 8 * COUNT.all)

    assert seconds(0) == seconds(0, 16) == pytest.approx(8)
    assert seconds(1) == seconds(2) == pytest.approx(8 + 2)
    assert seconds(2, 16) == pytest.approx(4 * 8 + 2)
    assert seconds(3) == pytest.approx(2 + 2 + 4)
    assert seconds(3, 16) == pytest.approx(4 * 8)
    assert step_of(config_of(2, ranks=1), ranks=1).communication == 0


def test_what_hides_communication() -> None:
    """DDP's sum is beside one micro-batch's backward, however many a step has; gathering has nothing beside it."""
    slow = replace(GPUS["h100"], link_gb_s=1.0)
    whole, quarter = (step_of(config_of(0, micro), gpu=slow) for micro in (64, 16))
    assert whole.host == pytest.approx(quarter.host / 4)
    for step, forwards in ((whole, 1), (quarter, 4)):
        backward = 2 / 3 * max(step.matrix + step.traffic, step.host) / forwards
        assert step.exposed == pytest.approx(step.communication - backward)
    gathering = 7 / 8 * 2 * COUNT.all / LINK
    fast = step_of(config_of(2))
    last = (fast.communication - gathering) / 8
    assert fast.exposed == pytest.approx(gathering + last), "the last of eight buckets ends after the backward"
    one = step_of(config_of(2, parallel={"bucket_elements": 10**9}))
    assert one.exposed == pytest.approx(one.communication), "a bucket of all of them is beside nothing"


@pytest.mark.parametrize(
    ("gpu", "slower"), [("4090", 2.0), ("l40s", 3.95), ("h100", 14.8), ("a100", 16.0), ("b200", 30.0)]
)
def test_fp32_is_slower_by_the_data_sheet(gpu: str, slower: float) -> None:
    half, full = (step_of(config_of(0, precision=kind), gpu=GPUS[gpu]) for kind in ("bf16", "fp32"))
    assert full.matrix / half.matrix == pytest.approx(slower, rel=0.01)


def test_an_offloaded_optimizer_takes_time() -> None:
    """Of a share of 12.5 million: fp32 gradients down, bf16 weights up, 42 bytes a parameter of the host's memory."""
    offload = {"offload_optimizer": True}
    one, several, three = (
        step_of(config_of(stage, micro, parallel=offload)) for stage, micro in ((2, 64), (2, 16), (3, 16))
    )
    host, moved = 12.5e6 * 42 / 50e9, 12.5e6 / (64e9 * HOST_SHARE)
    assert one.offload == several.offload == pytest.approx(host + 6 * moved)
    assert three.offload == pytest.approx(host + (4 * 7 + 2) * moved), "sums of four micro-batches lie on the host"
    assert one.optimizer == 0
    assert one.total == pytest.approx(max(one.device, one.host) + one.augment + one.exposed + one.offload)
    assert replace(one, offload=10.0).bound_by == "the optimizer on the host"
    kept = step_of(config_of(2))
    assert (kept.offload, kept.optimizer > 0) == (0, True)


def test_augmentation_takes_time() -> None:
    """By stage f of the GPU suite: of what is on the slowest, by the pixels made and the memory's rate."""
    config, h200 = config_of(0), GPUS["h200"]

    def seconds(gpu: Gpu = h200, **keys: Any) -> float:
        return step_of(replace(config, augment=Augmentation(**keys)), gpu=gpu).augment / 64

    plain, coloured, random = (seconds(preset=name, **PRESETS[name]) for name in ("mae", "deit3", "randaug"))
    assert (plain, coloured, random) == pytest.approx((1 / 17_018, 1 / 8_963, 1 / 6_788))
    assert seconds() == seconds(preset="simmim", **PRESETS["simmim"]) == plain
    assert seconds(erase=0.25) == seconds(cutmix=1.0) == coloured
    assert seconds(steps=(Step("invert"),), three_augment=True) == random
    assert seconds(GPUS["a100"]) / plain == pytest.approx(4800 / 2039)
    small = replace(config, model=replace(config.model, image_size=(112, 224)))
    assert step_of(small, gpu=h200).augment / 64 == pytest.approx(plain / 2)
    step = step_of(config)
    assert step.total == pytest.approx(max(step.device, step.host) + step.augment + step.exposed)
    assert replace(step, augment=10.0).bound_by == "augmentation"


def test_frozen_blocks_have_no_backward() -> None:
    whole, six, head = (flops(config_of(0, freeze=blocks)) for blocks in (0, 6, -1))
    assert whole.backward == 2 * whole.forward
    assert six.forward == head.forward == whole.forward
    assert six.backward / whole.backward == pytest.approx(0.5, rel=0.02)
    assert head.backward / whole.backward < 0.02
    frozen = step_seconds(config_of(0, freeze=-1), World(), GPUS["h100"], COUNT, head, StepCount(0, 0, 1e9), 400e9)
    trained = step_seconds(config_of(0), World(), GPUS["h100"], COUNT, whole, StepCount(0, 0, 1e9), 400e9)
    assert trained.matrix / frozen.matrix == pytest.approx(3, rel=0.03)
    assert trained.host / frozen.host == pytest.approx(3, rel=0.03)
