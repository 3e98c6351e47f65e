from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.engine.guard import Diverged, SampleGuard, SpikeGuard, StepGuard
from vitscale.errors import DataError


def test_a_spike_that_lasts_ends_the_run_where_it_is_asked_for() -> None:
    written: list[str] = []
    guard = SpikeGuard(8.0, [1.0] * 40, ends=True)
    for step, loss in enumerate([2.0, 2.0, 1.0, 2.0, 2.0], start=1):
        guard.note(step, loss, never)
    with pytest.raises(Diverged, match=r"step 6: the loss is 2, above 1\.08 .* in 3 steps in a row") as caught:
        guard.note(6, 2.0, lambda: written.append("rows"))
    assert (caught.value.first, caught.value.last, written) == (4, 6, ["rows"])


def never() -> str:
    raise AssertionError("asked for before the limit")


def test_skipped_steps_in_a_row_end_the_run() -> None:
    guard = StepGuard(limit=3)
    for step, applied in enumerate([False, False, True, False, False]):
        guard.note(step, applied, never)
    assert (guard.skipped, guard.in_a_row) == (4, 2)
    guard = StepGuard(3, guard.skipped, guard.in_a_row)  # of a run that was stopped and goes on
    written = []
    with pytest.raises(Diverged, match="3 steps in a row"):
        guard.note(5, applied=False, before_end=lambda: written.append("rows"))
    assert written == ["rows"]


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.floats(0, 0.5), st.floats(-0.002, 0.002))
@settings(max_examples=25)
def test_noise_is_no_spike_and_a_jump_is_one(seed: int, level: float, noise: float, slope: float) -> None:
    """Of losses with normal noise, and a slow rise or fall, none of 400 is a spike."""
    chance = np.random.default_rng(seed)
    guard = SpikeGuard(8.0, [])
    for step in range(400):
        loss = level * (1 + noise * chance.normal() + slope * step)
        assert guard.note(step, loss, never) is None
    assert guard.spikes == 0
    high = level * (1 + abs(slope) * 400) * (2 + 20 * noise)
    line = guard.note(400, high, never)
    assert line is not None
    assert line.startswith("step 400: the loss is ")
    assert guard.note(401, high, never) is None  # told once, counted twice
    assert (guard.spikes, guard.in_a_row) == (2, 2)
    for step in range(402, 402 + SpikeGuard.WINDOW):
        guard.note(step, high, never)
    assert guard.in_a_row == 0  # a new level


def test_losses_that_are_not_finite_are_left_to_the_other_guard() -> None:
    guard = SpikeGuard(8.0, [1.0] * SpikeGuard.WINDOW)
    assert guard.note(1, math.nan, never) is guard.note(2, math.inf, never) is None
    assert (guard.spikes, guard.losses) == (0, [1.0] * SpikeGuard.WINDOW)
    assert guard.note(3, 1.07, never) is None  # of losses that are all the same, within LEAST of them
    assert guard.note(4, 1.09, never) is not None


def test_a_few_bad_samples_are_always_allowed() -> None:
    guard = SampleGuard(0.0, {})
    guard.note(["undecodable"] * 3, 100, never)
    reason = r"4 bad samples \(3 undecodable, 1 label\) among 200 .*fraction=0.0; one of them is s/k \(label"
    with pytest.raises(DataError, match=reason):
        guard.note(["label"], 200, lambda: "s/k (label: 'x' is no whole number)")


def test_counts_go_on_after_a_resume() -> None:
    guard = SampleGuard(0.01, {"undecodable": 9})
    guard.note(["undecodable"], 1000, never)
    assert guard.counts == {"undecodable": 10}
    with pytest.raises(DataError):
        guard.note(["undecodable"], 1000, lambda: "s/k")
