"""What is planned for a step's memory: exact on fake tensors, near to what engines have in use on real ones."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.integration.worlds import Launcher
from vitscale.bench.sharding import in_megabytes, measure
from vitscale.config.schema import MAE, Model, Objective, Parallel, RunConfig, Train
from vitscale.planning import memory as planned
from vitscale.planning.live import LiveBytes
from vitscale.planning.memory import activations, memory
from vitscale.world import World, enter

MODEL = Model(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256, image_size=64,
              patch_size=8, num_labels=10)  # fmt: skip
DECODER = MAE(decoder_hidden_size=48, decoder_num_attention_heads=2, decoder_num_hidden_layers=4,
              decoder_intermediate_size=192)  # fmt: skip


def config_of(
    objective: str = "mae", stage: int = 0, again: bool | str = False, ranks: int = 1, **train: Any
) -> RunConfig:
    kinds = {"precision": "bf16", "micro_batch": 32, "global_batch": 32 * ranks}
    return RunConfig(
        model=MODEL,
        objective=Objective(name=objective, mae=DECODER),
        train=Train(gradient_checkpointing=again, **kinds | train),
        parallel=Parallel(zero_stage=stage, bucket_elements=50_000),
    )


def test_bytes_are_counted_while_they_live() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[10:]
        assert (live.live, live.made) == (4000, 4000)
        second = first + 1
        del first
        assert live.live == 8000, "the view has the memory"
        del view, second
        assert (live.live, live.peak) == (0, 8000)
        live.start_again()
        assert live.peak == 0


@pytest.mark.parametrize(("objective", "again"), [
    *itertools.product(("mae", "simmim", "classification", "multitask"), (False, True)), ("mae", "selective")
])  # fmt: skip
def test_blocks_and_images_add_up(objective: str, again: bool | str) -> None:
    """What follows from one and two blocks and two batches is what the whole model of another batch counts."""
    config = config_of(objective, again=again)
    follows = activations(config).of(24)
    counted = planned._count(config, 24)
    assert follows.peak == pytest.approx(counted.peak, rel=0.02)
    assert follows.made == pytest.approx(counted.made, rel=0.02)


@pytest.mark.parametrize(("stage", "again"), [
    *itertools.product((0, 1, 2, 3), (False, True)), (0, "selective"), (3, "selective"),
    *(pytest.param(stage, "selective", marks=pytest.mark.full) for stage in (1, 2)),
])  # fmt: skip
def test_an_engine_takes_what_was_planned(stage: int, again: bool | str, single_rank: None) -> None:
    result = planned_and_measured(config_of(stage=stage, again=again), enter())
    assert 0.9 < result["accuracy"] < 1.1, result


def planned_and_measured(config: RunConfig, world: World) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for part in measure(config, False, 1, world):
        told |= part
    return told | in_megabytes(told)


def of_rank(stage: int) -> dict[str, Any]:
    world = enter(on_ranks=True)
    return planned_and_measured(config_of(stage=stage, ranks=world.world_size), world)


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)])
def test_ranks_share_it(launcher: Launcher, stage: int) -> None:
    for result in launcher.call(of_rank, 2, stage=stage):
        assert 0.9 < result["accuracy"] < 1.1, result


def test_parts_by_stage() -> None:
    """Of 8 ranks: what is whole, what is a share, what the weights' moving average adds."""
    ranks, count = World(world_size=8, local_world_size=8, device="cuda"), 8_000_000
    nothing = planned.StepCount(0.0, 0.0, 0.0)

    def at(stage: int, **keys: Any) -> Any:
        return memory(config_of(stage=stage, ranks=8, **keys), ranks, count, nothing)

    assert [at(stage).weights for stage in range(4)] == [4 * count, 2 * count, 2 * count, 2 * count // 8]
    assert [at(stage).masters for stage in range(4)] == [0, *[4 * count // 8] * 3]
    assert [at(stage).moments for stage in range(4)] == [8 * count, *[count] * 3]
    assert [at(stage, ema_decay=0.99).ema for stage in range(4)] == [4 * count, *[count // 2] * 3]
    several = replace(config_of(stage=1, ranks=8), train=Train(precision="bf16", micro_batch=16, global_batch=256))
    assert memory(several, ranks, count, nothing).gradients == 4 * count
    offloaded = replace(config_of(stage=2, ranks=8), parallel=Parallel(zero_stage=2, offload_optimizer=True))
    assert (memory(offloaded, ranks, count, nothing).moments, memory(offloaded, ranks, count, nothing).masters) == (
        0,
        0,
    )
    whole = at(2)
    assert whole.total_bytes == whole.allocated_bytes + whole.slack > whole.allocated_bytes
