"""The steps that a plan tells of, against those of the order that a run makes of its shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vitscale.config.load import config_of, load_config
from vitscale.config.step import total_steps
from vitscale.data.mixture import training_order
from vitscale.errors import ConfigError
from vitscale.planning.length import steps_or_missing

CONFIGS = Path(__file__).parents[2] / "configs"
SHARDS = np.array([1200, 1, 900, 4007, 333])
TWO = "data.train=[{pattern: a.tar, %s}, {pattern: b.tar, %s}]"


@pytest.mark.parametrize("keys", [
    [],
    ["augment.repeats=3"],
    ["augment.repeats=3", "data.lanes=8", "data.window=16384"],
    ["data.lanes=256"],
    ["data.epoch_samples=5000"],
    ["data.epoch_samples=5000", "augment.repeats=3"],
    ["data.train=[a.tar, b.tar]"],
    [TWO % ("weight: 1", "weight: 3.7")],
    [TWO % ("weight: 1", "weight: 3"), "augment.repeats=3"],
    [TWO % ("repeat: 2", "repeat: 2")],
    [TWO % ("repeat: 2", "weight: null"), "data.epoch_samples=5000"],
    ["train.steps=77"],
])  # fmt: skip
def test_steps_are_those_of_the_runs_order(keys: list[str]) -> None:
    config = config_of({"train.epochs": 2.7}, keys)
    order = training_order(config, SHARDS, [2, 3] if len(config.data.train) == 2 else [5])
    assert steps_or_missing(config, int(SHARDS.sum())) == total_steps(config, order.batches_per_epoch)


def test_shares_of_the_data() -> None:
    whole = config_of({}, ["train.epochs=10"])
    part = config_of({}, ["train.epochs=10", "data.fraction=0.5", "data.validation_fraction=0.2"])
    assert steps_or_missing(part, 100_000) == steps_or_missing(whole, 40_000)


def test_a_recipe_with_repeated_augmentation() -> None:
    config = load_config(CONFIGS / "pretrain_vit_b_deit3.yaml")
    assert steps_or_missing(config, 1_281_167) == 500_272


def test_what_is_missing() -> None:
    by_epochs = config_of({}, ["train.epochs=2"])
    assert "--images N" in str(steps_or_missing(by_epochs, None))
    assert isinstance(steps_or_missing(config_of({}, ["train.epochs=2", "data.epoch_samples=5000"]), None), int)
    by_times = config_of({}, ["train.epochs=2", TWO % ("repeat: 2", "weight: null")])
    assert "set train.steps" in str(steps_or_missing(by_times, 100_000))
    with pytest.raises(ConfigError, match=r"--images 300: train.global_batch=256: the data hold 300 samples, an epoch"):
        steps_or_missing(by_epochs, 300)
