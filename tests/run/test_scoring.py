"""Which scores are the best, and when a run ends for want of better ones."""

from __future__ import annotations

import dataclasses
import math

import pytest

from vitscale.config.schema import RunConfig, Train
from vitscale.engine.loop import TrainState
from vitscale.errors import ConfigError
from vitscale.run.scoring import judge


def config(**keys: object) -> RunConfig:
    return dataclasses.replace(RunConfig(), train=Train(**keys))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "values", "better"),
    [
        ("validation/top1", [0.5, 0.5, 0.4, 0.6], [True, False, False, True]),
        ("validation/loss", [0.5, 0.5, 0.4, 0.6], [True, False, True, False]),
        ("validation/raw_mae", [2.0, 1.0, math.nan, 0.5], [True, True, False, True]),
        ("validation/map", [math.nan, 0.1, 0.2], [False, True, True]),
    ],
)
def test_better(metric: str, values: list[float], better: list[bool]) -> None:
    state, found = TrainState(), []
    for step, value in enumerate(values):
        state.step = step
        found.append(judge(state, {metric: value, "validation/images": 3.0}, config(keep_best=metric)))
    assert found == better
    last = max(step for step, is_better in enumerate(better) if is_better)
    scores = {metric: values[last], "validation/images": 3.0}
    assert state.best == {"metric": metric, "value": values[last], "step": last, "scores": scores}


def test_a_run_ends_early_after_so_many_without_a_better_one() -> None:
    state, keys = TrainState(), config(keep_best="validation/top1", early_stopping=2)
    ends = []
    for value in (0.5, 0.4, 0.6, 0.6, 0.5):
        judge(state, {"validation/top1": value}, keys)
        ends.append(state.early_stopped)
    assert ends == [False, False, False, False, True]
    assert state.is_done(10**9)


def test_another_keep_best_goes_by_its_own_values() -> None:
    state = TrainState(step=1)
    assert judge(state, {"validation/top1": 0.7, "validation/loss": 1.1}, config(keep_best="validation/top1"))
    state.step = 2
    assert judge(state, {"validation/top1": 0.6, "validation/loss": 1.0}, config(keep_best="validation/loss"))
    assert (state.best or {})["step"] == 2
    state.step = 3
    assert not judge(state, {"validation/top1": 0.5, "validation/loss": 1.05}, config(keep_best="validation/top1"))
    assert (state.best or {}) | {"scores": 0} == {"metric": "validation/top1", "value": 0.6, "step": 2, "scores": 0}


def test_a_score_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"train\.keep_best=validation/top2: must be one of validation/top1, validat"):
        judge(TrainState(), {"validation/top1": 1, "validation/loss": 0}, config(keep_best="validation/top2"))
    assert not judge(TrainState(), {}, config())
