"""Selective checkpointing in an engine: the numbers of training without it, at every stage."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest

from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import Training
from vitscale.world import World

pytestmark = pytest.mark.usefixtures("single_rank")


def losses(stage: int, **train: Any) -> list[float]:
    config = small_config("multitask")
    config = replace(
        config, train=replace(config.train, micro_batch=4, **train), parallel=replace(config.parallel, zero_stage=stage)
    )
    with Training(config, World()) as training:
        return training.steps(0, 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_bit_changes(stage: int) -> None:
    assert losses(stage, gradient_checkpointing="selective") == losses(stage)


@pytest.mark.full
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compiled(stage: int) -> None:
    expected = losses(stage, compile=True)
    assert losses(stage, compile=True, gradient_checkpointing="selective") == pytest.approx(expected, rel=1e-6)
