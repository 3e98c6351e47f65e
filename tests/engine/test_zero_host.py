"""DeepSpeed's optimizers with fewer operations (engine/zero_host.py) train as they do by themselves, bit for bit."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from types import FrameType
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


def test_stage_3_asks_for_no_signatures_and_seldom_for_its_rank() -> None:
    """DeepSpeed by itself does both in each hook of each part of the model, and marks a range for a profiler."""
    config = small_config("mae")
    calls: Counter[str] = Counter()
    to_print = 0  # questions for the rank

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal to_print
        if event == "call":
            calls[frame.f_code.co_name] += 1
            asked = frame.f_code.co_name == "get_rank" and frame.f_back is not None
            to_print += asked and frame.f_back.f_code.co_name == "print_rank_0"

    with Training(replace(config, parallel=replace(config.parallel, zero_stage=3)), World()) as training:
        training.steps(0, 2)
        sys.setprofile(count)
        try:
            training.steps(2, 3)
        finally:
            sys.setprofile(None)
    assert calls["fetch_sub_module"] > 10
    assert calls["signature"] > 10
    assert calls["_signature_from_function"] == calls["_range_push"] == 0
    assert to_print < 10
