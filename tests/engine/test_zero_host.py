"""DeepSpeed's optimizers with fewer operations (engine/zero_host.py) train as they do by themselves, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import Training
from vitscale.config.schema import RunConfig
from vitscale.engine import zero
from vitscale.world import World

pytestmark = pytest.mark.usefixtures("single_rank")


def _train(config: RunConfig) -> tuple[list[float], list[Any]]:
    with Training(config, World()) as training:
        losses = training.steps(0, 4)
        return losses, [(p.kind, p.name, p.start, p.values.tobytes()) for p in training.engine.snapshot()]


# Buckets in which one parameter, several or all lie; the smallest are smaller than some parameters.
@pytest.mark.parametrize("bucket", [200, 1500, 25_000_000])
@pytest.mark.parametrize(("stage", "precision", "accumulation"), [
    (1, "fp32", 2), (1, "bf16", 1), (2, "fp32", 1), (2, "bf16", 2), (3, "bf16", 1)
])  # fmt: skip
def test_bits_are_those_of_deepspeed(
    stage: int, precision: str, accumulation: int, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("multitask")
    train = replace(config.train, precision=precision, micro_batch=8 // accumulation)
    config = replace(config, train=train, parallel=replace(config.parallel, zero_stage=stage, bucket_elements=bucket))
    losses, pieces = _train(config)
    monkeypatch.setattr(zero, "spare_the_host", lambda *_: None)
    assert _train(config) == (losses, pieces)
