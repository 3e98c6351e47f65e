from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.config.schema import Optimizer, RunConfig, Train
from vitscale.engine.schedule import lr_at, peak_lr


def _config(**optimizer: object) -> RunConfig:
    return replace(RunConfig(), optimizer=replace(Optimizer(), **optimizer), train=Train(global_batch=4096))


def test_linear_scaling() -> None:
    assert peak_lr(_config(lr=1.5e-4, lr_batch=256)) == pytest.approx(2.4e-3)
    assert peak_lr(_config(lr=1.5e-4, lr_batch=None)) == 1.5e-4


def test_warm_up_peak_and_end() -> None:
    config = _config(lr=1.0, lr_batch=None, warmup=0.1, min_lr=0.01)
    curve = [lr_at(step, 100, config) for step in range(100)]
    assert curve[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert curve[10] == 1.0
    assert curve[55] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert lr_at(100, 100, config) == pytest.approx(0.01)


@given(st.integers(1, 5000), st.floats(0, 0.99), st.floats(0, 1))
@settings(max_examples=50)
def test_rises_then_falls(total: int, warmup: float, floor: float) -> None:
    config = _config(lr=1.0, lr_batch=None, warmup=warmup, min_lr=floor)
    curve = [lr_at(step, total, config) for step in range(total + 1)]
    peak = round(warmup * total)
    assert all(0 < value <= 1 + 1e-12 for value in curve[:-1])
    assert curve[:peak] == sorted(curve[:peak])
    assert curve[peak:] == sorted(curve[peak:], reverse=True)
