"""The suite's yardsticks would see what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitscale.bench.gpu_suite.cases import Mismatch
from vitscale.bench.gpu_suite.correctness import TOLERANCES, _judge, small_config
from vitscale.bench.gpu_suite.profiling import idle_share
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


def test_idle_is_what_no_kernel_covers() -> None:
    assert idle_share([(0, 10), (5, 20), (30, 40)]) == pytest.approx(0.25)
    assert idle_share([(30, 40), (0, 100), (50, 60)]) == 0
    assert idle_share([]) == 0
