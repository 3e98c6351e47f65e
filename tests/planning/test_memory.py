"""What is planned for a step's memory: exact on fake tensors, near to what engines have in use on real ones."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.integration.worlds import Launcher
from vitscale.bench.peers import run_config
from vitscale.bench.sharding import in_megabytes, measure
from vitscale.config.schema import MAE, Model, Objective, Parallel, RunConfig, Train
from vitscale.planning import memory as planned
from vitscale.planning.live import LiveBytes
from vitscale.planning.memory import Parameters, activations, memory, parameters
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
        parallel=Parallel(zero_stage=stage),
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


@pytest.mark.parametrize(("objective", "again", "freeze"), [
    *itertools.product(("mae", "simmim", "classification", "multitask"), (False, True), (0,)), ("mae", "selective", 0),
    ("classification", False, 1), ("classification", True, 2), ("classification", False, -1),
])  # fmt: skip
def test_blocks_and_images_add_up(objective: str, again: bool | str, freeze: int) -> None:
    """What follows from two depths and two batches is what the whole model of another batch counts."""
    config = config_of(objective, again=again, freeze=freeze)
    follows = activations(config, "cuda").of(24)
    counted = planned._count(config, "cuda", 24)
    assert follows.peak == pytest.approx(counted.peak, rel=0.02)
    assert follows.made == pytest.approx(counted.made, rel=0.02)


def standard(preset: str, objective: str, stage: int, again: bool | str) -> RunConfig:
    train = Train(precision="bf16", gradient_checkpointing=again)
    return replace(run_config(preset, objective), train=train, parallel=Parallel(zero_stage=stage))


@pytest.mark.full
@pytest.mark.parametrize("preset", ["B", "L", "H"])
@pytest.mark.parametrize(("objective", "stage", "again"), [
    ("mae", 0, False), ("mae", 2, True), ("classification", 2, "selective"),
])  # fmt: skip
def test_standard_models_counted_whole(preset: str, objective: str, stage: int, again: bool | str) -> None:
    config = standard(preset, objective, stage, again)
    follows, counted = activations(config, "cuda").of(24), planned._count(config, "cuda", 24)
    assert follows.peak == pytest.approx(counted.peak, rel=1e-3)
    assert follows.made == pytest.approx(counted.made, rel=1e-3)


@pytest.mark.full
@pytest.mark.parametrize(("stage", "again"), [(0, False), (2, True)])
def test_tensors_with_content_take_as_much(stage: int, again: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = standard("B", "mae", stage, again)
    follows = activations(config, "cuda").of(4)
    monkeypatch.setattr(planned, "FakeTensorMode", nullcontext)
    assert follows.peak == pytest.approx(planned._count(config, 4).peak, rel=0.01)


@pytest.mark.parametrize(("stage", "again"), [
    *itertools.product((0, 1, 2, 3), (False, True)), (0, "selective"), (3, "selective"),
    *(pytest.param(stage, "selective", marks=pytest.mark.full) for stage in (1, 2)),
])  # fmt: skip
def test_an_engine_takes_what_was_planned(stage: int, again: bool | str, single_rank: None) -> None:
    result = planned_and_measured(config_of(stage=stage, again=again), enter())
    assert 0.9 < result["accuracy"] < 1.1, result


# In these the buckets, or what the optimizer's step makes, are much of the memory; in the ones above the activations.
SMALL_BATCH = [
    (1, "bf16", None, 1), (2, "bf16", None, 1), (3, "bf16", None, 1), (3, "bf16", 50_000, 1), (3, "fp32", None, 1),
    (0, "bf16", None, 2), (2, "fp32", None, 2), (2, "bf16", None, 2),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "precision", "bucket", "accumulation"), SMALL_BATCH)
def test_buckets_are_planned(
    stage: int, precision: str, bucket: int | None, accumulation: int, single_rank: None
) -> None:
    config = config_of(stage=stage, precision=precision, micro_batch=2, global_batch=2 * accumulation)
    config = replace(config, parallel=Parallel(zero_stage=stage, bucket_elements=bucket))
    result = planned_and_measured(config, enter())
    assert 0.9 < result["accuracy"] < 1.1, result


@pytest.mark.parametrize(("stage", "freeze"), [(0, -1), (2, 2), (3, 2)])
def test_what_is_frozen_takes_no_gradients_and_moments(stage: int, freeze: int, single_rank: None) -> None:
    config = config_of("classification", stage, micro_batch=8, global_batch=8, freeze=freeze, ema_decay=0.9)
    result = planned_and_measured(config, enter())
    assert 0.9 < result["accuracy"] < 1.1, result


def planned_and_measured(config: RunConfig, world: World) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for part in measure(config, False, 1, world):
        told |= part
    return told | in_megabytes(told)


def of_rank(stage: int, micro_batch: int) -> dict[str, Any]:
    world = enter(on_ranks=True)
    return planned_and_measured(config_of(stage=stage, ranks=world.world_size, micro_batch=micro_batch), world)


# Of 32 images a rank; the last one accumulates.
@pytest.mark.parametrize(
    ("stage", "micro_batch"),
    [(2, 32), *(pytest.param(*case, marks=pytest.mark.full) for case in ((0, 32), (3, 32), (0, 2)))],
)
def test_ranks_share_it(launcher: Launcher, stage: int, micro_batch: int) -> None:
    for result in launcher.call(of_rank, 2, stage=stage, micro_batch=micro_batch):
        assert 0.9 < result["accuracy"] < 1.1, result


def test_parts_by_stage() -> None:
    """Of 8 ranks: what is whole, what is a share, what the weights' moving average adds."""
    ranks, count = World(world_size=8, local_world_size=8, device="cuda"), 8_000_000
    of_model = Parameters(count, count, count)
    nothing = planned.StepCount(0.0, 0.0, 0.0)

    def at(stage: int, **keys: Any) -> Any:
        return memory(config_of(stage=stage, ranks=8, **keys), ranks, of_model, nothing)

    assert [at(stage).weights for stage in range(4)] == [4 * count, 2 * count, 2 * count, 2 * count // 8]
    assert [at(stage).masters for stage in range(4)] == [0, *[4 * count // 8] * 3]
    assert [at(stage).moments for stage in range(4)] == [8 * count, *[count] * 3]
    assert [at(stage, ema_decay=0.99).ema for stage in range(4)] == [4 * count, *[count // 2] * 3]
    assert [at(stage, micro_batch=16).gradients for stage in (0, 2, 3)] == [4 * count, count // 2, count // 2]
    offloaded = replace(config_of(stage=2, ranks=8), parallel=Parallel(zero_stage=2, offload_optimizer=True))
    there = memory(offloaded, ranks, of_model, nothing)
    assert (there.moments, there.masters, there.gradients) == (0, 0, 0)
    whole = at(2)
    assert whole.total_bytes == whole.allocated_bytes + whole.slack > whole.allocated_bytes


def test_parts_of_a_frozen_model() -> None:
    """On 8 GPUs: forwards use all weights, all else is of those that are trained."""
    config = config_of("classification", ranks=8, freeze=-1, ema_decay=0.9)
    count, ranks = parameters(config), World(world_size=8, local_world_size=8, device="cuda")
    assert count.trained == (MODEL.hidden_size + 1) * MODEL.num_labels
    assert count.all == parameters(config_of("classification")).trained
    found = memory(config, ranks, count, planned.StepCount(0.0, 0.0, 0.0))
    assert found.weights == 4 * count.all
    assert (found.gradients, found.moments, found.ema) == (4 * count.trained, 8 * count.trained, 4 * count.trained)


def test_a_gpu_has_two_buckets_where_they_overlap() -> None:
    """bf16: 2 bytes an element of each, and 6 of copies to be summed; at stage 3 one in fp32, and a copy of it."""
    ranks, count = World(world_size=8, local_world_size=8, device="cuda"), Parameters(8_000_000, 8_000_000, 1)
    much = planned.StepCount(1e9, 1e9, 0.0)

    def buckets(stage: int, **keys: Any) -> int:
        config = replace(config_of(stage=stage, ranks=8), parallel=Parallel(zero_stage=stage, **keys))
        return memory(config, ranks, count, much).buckets

    assert buckets(1) == buckets(2) == 2 * 2 * 1_000_000
    assert buckets(3) == 4 * 1_000_000
    assert buckets(3, reduce_dtype="bf16") == 2 * 1_000_000
    assert buckets(2, bucket_elements=100_000_000) == 2 * 2 * 8_000_000, "never more than there is to reduce"
    much = planned.StepCount(0.0, 0.0, 0.0)
    assert buckets(2) == (2 * 2 + 2 + 4) * 1_000_000
    assert buckets(3) == (4 + 4) * 1_000_000 + 2 * 1_000_000 // 8
    alone = memory(config_of(stage=3), World(device="cuda"), count, much)
    assert alone.buckets == 4 * 1_000_000 + (4 + 2) * 8_000_000, "what AdamW steps by, made of what is bf16"
