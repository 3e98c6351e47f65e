"""The suite's yardsticks would see what they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vitscale.bench.gpu_suite.cases import Mismatch
from vitscale.bench.gpu_suite.correctness import TOLERANCES, _judge, small_config
from vitscale.bench.gpu_suite.profiling import FEED, feed_overlap, idle_share
from vitscale.bench.gpu_suite.training import batch, gradient_distances, gradients, update_distance

CPU = torch.device("cpu")


def test_gradients_are_measured_by_parameter_and_in_all() -> None:
    expected = {"large": torch.full((4,), 10.0), "small": torch.full((4,), 1.0)}
    found = {"large": torch.full((4,), 10.1), "small": torch.full((4,), 1.5)}
    total, largest, worst = gradient_distances(found, expected)
    assert worst == "small"
    assert largest == pytest.approx(0.5)
    assert total == pytest.approx(np.hypot(0.2, 1.0) / np.hypot(20, 2))
    nan = gradient_distances({**found, "large": torch.full((4,), torch.nan)}, expected)
    assert nan[2] == "large"
    assert np.isnan(nan[1])
    with pytest.raises(Mismatch, match="small"):
        gradient_distances({"large": found["large"]}, expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("fault", ["sign of one", "one of them NaN", "all a tenth too large", "loss"])
def test_a_fault_in_a_gradient_is_refused(dtype: torch.dtype, fault: str) -> None:
    loss, its = gradients(small_config("mae"), CPU, torch.float32)
    _judge({dtype: (loss, its)}, (loss, its))
    name = "vit.encoder.layers.1.layernorm_after.weight"
    wrong = dict(its)
    if fault == "sign of one":
        wrong[name] = -its[name]
    elif fault == "one of them NaN":
        wrong[name] = torch.full_like(its[name], torch.nan)
    elif fault == "all a tenth too large":
        wrong = {key: gradient * 1.1 for key, gradient in its.items()}
    with pytest.raises(Mismatch):
        _judge({dtype: (loss * (1.01 if fault == "loss" else 1), wrong)}, (loss, its))


def test_the_weights_way_is_measured_against_how_far_they_went() -> None:
    start, end = {"w": np.zeros(4)}, {"w": np.ones(4)}
    assert update_distance(end, end, start) == 0
    assert update_distance(start, end, start) == pytest.approx(1)  # not stepped
    assert update_distance({"w": -np.ones(4)}, end, start) == pytest.approx(2)


def test_batches_are_functions_of_their_number() -> None:
    config = small_config("multitask")
    first, again, other = (batch(config, number, CPU) for number in (3, 3, 4))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    assert not set(first["sample_key"].tolist()) & set(other["sample_key"].tolist())


def trace_of(*work: tuple[int, float, float, bool]) -> list[dict[str, Any]]:
    """The events that torch's profiler writes for kernels (stream, start, duration, whether the feed started it): the
    feed's range is on the thread that also starts a step's kernels, which autograd's thread does too."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0},
        {"cat": "user_annotation", "name": FEED, "tid": 1, "ts": 100.0, "dur": 50.0},
        {"cat": "user_annotation", "name": "a step", "tid": 1, "ts": 0.0, "dur": 500.0},
        {"cat": "cpu_op", "name": "aten::mm", "tid": 1, "ts": 100.0, "dur": 5.0, "args": {"External id": 7}},
        {"cat": "gpu_user_annotation", "name": FEED, "tid": 20, "ts": 100.0, "dur": 1000.0, "args": {}},
    ]
    for number, (stream, start, duration, own) in enumerate(work):
        thread, began = [(1, 120.0), (1, 160.0), (2, 120.0)][0 if own else 1 + number % 2]
        kind = ("cuda_runtime", "cuda_driver")[number % 2]
        at = {"ts": began, "dur": 2.0, "tid": thread}
        events.append({"cat": kind, "name": "cudaLaunchKernel", "args": {"correlation": number}, **at})
        what = ("kernel", "gpu_memcpy")[own and number % 2]
        at = {"ts": start, "dur": duration, "tid": stream}
        events.append({"cat": what, "name": "it", "args": {"correlation": number, "stream": stream}, **at})
    return events


def test_what_the_feed_does_beside_the_step_is_told_from_a_trace() -> None:
    """Of its 40 us, 10 beside the stream that computes; what it does beside a third stream does not count."""
    step = [(7, 1000.0, 100.0, False), (7, 1090.0, 30.0, False), (9, 1500.0, 50.0, False)]
    feed = [(20, 1110.0, 20.0, True), (20, 1200.0, 10.0, True), (20, 1510.0, 10.0, True)]
    assert feed_overlap(trace_of(*step, *feed)) == {
        "feed_total_ms": pytest.approx(0.04),
        "feed_overlap": pytest.approx(0.25),
    }
    assert feed_overlap(trace_of(*feed))["feed_overlap"] == 0
    assert feed_overlap(trace_of(*step)) == {}


def test_idle_is_what_no_kernel_covers() -> None:
    assert idle_share([(0, 10), (5, 20), (30, 40)]) == pytest.approx(0.25)
    assert idle_share([(30, 40), (0, 100), (50, 60)]) == 0
    assert idle_share([]) == 0
