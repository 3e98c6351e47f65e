"""Blocks replayed by CUDA graphs (engine/graphs.py) train as they do without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vitscale import world
from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import Training, Weights, update_distance
from vitscale.config.schema import RunConfig
from vitscale.world import World

pytestmark = pytest.mark.gpu
STEPS = 4


def _train(config: RunConfig) -> tuple[list[float], Weights]:
    with Training(config, World(device="cuda")) as training:
        return training.steps(0, STEPS), training.weights()


@pytest.mark.parametrize(
    ("objective", "stage", "accumulation"),
    [("mae", 0, 1), ("mae", 0, 2), ("mae", 2, 1), ("mae", 2, 2), ("multitask", 0, 1), ("classification", 1, 1)],
)
def test_graphs_change_nothing(objective: str, stage: int, accumulation: int) -> None:
    world.enter()
    config = small_config(objective)
    size = 8 // accumulation
    train = replace(config.train, precision="bf16", micro_batch=size)
    config = replace(config, train=train, parallel=replace(config.parallel, zero_stage=stage))
    losses, weights = _train(config)
    graphed, others = _train(replace(config, train=replace(train, cuda_graphs=True)))
    assert graphed == pytest.approx(losses, rel=1e-4)
    assert update_distance(others, weights, {name: np.zeros_like(values) for name, values in weights.items()}) < 1e-4
