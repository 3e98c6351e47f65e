"""What a GPU takes for a trial, beside what was planned; what is left of its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitscale.bench.peers import run_config
from vitscale.config.schema import RunConfig
from vitscale.config.step import with_step
from vitscale.engine.room import room
from vitscale.planning.memory import activations
from vitscale.planning.trial import trial
from vitscale.world import World

pytestmark = pytest.mark.gpu
DEVICE, ROOM = torch.device("cuda", 0), 10**10


def small(stage: int, micro_batch: int) -> RunConfig:
    config = run_config("S", "mae")
    return with_step(replace(config, train=replace(config.train, precision="bf16")), stage, micro_batch)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_trial_takes_what_was_planned_and_leaves_nothing(stage: int) -> None:
    before = torch.cuda.memory_allocated(DEVICE)
    config = small(stage, 128)
    took = trial(config, DEVICE, ROOM)
    assert took == pytest.approx(activations(config, "cuda").of(128).peak, rel=0.15)
    assert torch.cuda.memory_allocated(DEVICE) - before < 100_000_000, "cuBLAS keeps its workspace"


def test_a_trial_that_cannot_fit_is_told_and_leaves_nothing() -> None:
    before = torch.cuda.memory_allocated(DEVICE)
    assert trial(small(0, 1_000_000), DEVICE, ROOM) is None
    assert torch.cuda.memory_allocated(DEVICE) - before < 100_000_000
    assert trial(small(0, 2), DEVICE, ROOM) is not None


def test_the_room_is_what_others_leave() -> None:
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    own = torch.ones(250_000_000, device=DEVICE)
    found = room(World(device="cuda"), DEVICE)
    assert total * 0.2 < found.bytes <= total * 1.01, "whatever this process holds is its own"
    assert own.sum() > 0
