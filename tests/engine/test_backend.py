"""Backends one after the other in a process, as the GPU suite and `vitscale evaluate` make them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from vitscale import world
from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import Training
from vitscale.config.schema import Parallel, RunConfig


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A single rank's; taken away again for the tests that start processes."""
    before = dict(os.environ)
    world.enter()
    yield
    os.environ.clear()
    os.environ.update(before)


def config(stage: int, deterministic: bool = False) -> RunConfig:
    small = small_config("multitask")
    return replace(
        small, parallel=Parallel(zero_stage=stage), train=replace(small.train, deterministic=deterministic)
    )


def test_a_backend_leaves_nothing_to_the_next_one() -> None:
    """Of another stage: accelerate and DeepSpeed keep theirs in the process."""
    losses, linear = [], torch.nn.functional.linear
    for stage in (0, 3, 0, 2):
        with Training(config(stage), world.World()) as training:
            assert training.engine.stage == stage
            assert (type(training.engine.model).__name__ == "DeepSpeedEngine") == (stage > 0)
            losses.append(training.steps(0, 2))
        assert not torch.distributed.is_initialized()
        assert torch.nn.functional.linear is linear
        assert not [name for name in os.environ if name.startswith("ACCELERATE_")]
    assert losses == [pytest.approx(losses[0], rel=1e-6)] * 4


def test_deterministic_algorithms_are_the_configs() -> None:
    for asked in (True, False):
        with Training(config(0, deterministic=asked), world.World()):
            assert torch.are_deterministic_algorithms_enabled() == asked
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
