"""Backends one after the other in a process, as the GPU suite and `vitscale evaluate` make them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from vitscale import world
from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import Training
from vitscale.config.schema import Parallel, RunConfig
from vitscale.models.vit import ViTPreTrainedModel


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A single rank's; taken away again for the tests that start processes."""
    before = dict(os.environ)
    world.enter()
    yield
    os.environ.clear()
    os.environ.update(before)


def config(stage: int, objective: str = "multitask", **train: Any) -> RunConfig:
    small = small_config(objective)
    return replace(small, parallel=Parallel(zero_stage=stage), train=replace(small.train, **train))


def test_a_backend_leaves_nothing_to_the_next_one() -> None:
    """Of another stage: accelerate and DeepSpeed keep theirs in the process."""
    losses, linear = [], torch.nn.functional.linear
    for stage in (0, 3, 0, 2):
        with Training(config(stage), world.World()) as training:
            assert training.engine.stage == stage
            assert (type(training.engine.model).__name__ == "DeepSpeedEngine") == (stage > 0)
            losses.append(training.steps(0, 2))
        assert not torch.distributed.is_initialized()
        assert not [name for name in os.environ if name.startswith("ACCELERATE_")]
        assert torch.nn.functional.linear is linear
    assert losses == [pytest.approx(losses[0], rel=1e-6)] * 4


def test_deterministic_algorithms_are_the_configs() -> None:
    for asked in (True, False):
        with Training(config(0, deterministic=asked), world.World()):
            assert torch.are_deterministic_algorithms_enabled() == asked
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_blocks_compile_whole(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for the encoder's blocks, one for the decoder's: DDP's buckets and ZeRO-3's hooks cut none."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compile_blocks = ViTPreTrainedModel.compile_blocks
    monkeypatch.setattr(ViTPreTrainedModel, "compile_blocks", lambda model: compile_blocks(model, backend=backend))
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    torch.compiler.reset()
    losses = []
    for compiled in (False, True):
        with Training(config(stage, "mae", compile=compiled), world.World()) as training:
            losses.append(training.steps(0, 2))
    assert len(graphs) == 2
    assert losses[0] == losses[1]
