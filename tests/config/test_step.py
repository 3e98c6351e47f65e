"""How a step is shared out, and what `auto` may come to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config.check import check_config
from vitscale.config.load import config_of, dump_config, load_config
from vitscale.config.schema import AUTO, RunConfig, Train
from vitscale.config.step import accumulation, auto_keys, bucket_elements, choices, step_keys, with_step
from vitscale.errors import ConfigError
from vitscale.world import World

BOTH = ("parallel.zero_stage=auto", "train.micro_batch=auto")


def made(*keys: str) -> RunConfig:
    return config_of({}, ["train.steps=9", *keys])


@given(
    batch=st.integers(1, 200),
    ranks=st.integers(1, 8),
    bf16=st.booleans(),
    mixes=st.booleans(),
    stage=st.sampled_from([0, 1, 2, 3, AUTO]),
)
def test_choices_are_all_that_the_rules_allow(batch: int, ranks: int, bf16: bool, mixes: bool, stage: int) -> None:
    keys = ["objective.name=classification", "augment.mixup=0.8"] if mixes else []
    precision = "bf16" if bf16 else "fp32"
    config = made(f"train.global_batch={batch}", f"train.precision={precision}", f"parallel.zero_stage={stage}", *keys)
    config, world = with_step(config, stage, AUTO), World(world_size=ranks)
    allowed = []
    for each in (0, 1, 2, 3) if stage == AUTO and ranks > 1 else (0 if stage == AUTO else stage,):
        for micro in range(1, batch + 1):
            written = with_step(config, each, micro)
            try:
                check_config(written, world)
                allowed.append(written)
            except ConfigError:
                continue
    if not allowed:
        with pytest.raises(ConfigError, match=r"whatever .*train\.micro_batch comes to"):
            check_config(config, world)
        return
    check_config(config, world)
    assert choices(config, world) == allowed
    for each in allowed:
        assert accumulation(each, world) * each.train.micro_batch * ranks == batch


def test_auto_is_read_and_written(tmp_path: Path) -> None:
    config = made(*BOTH)
    assert auto_keys(config) == ["parallel.zero_stage", "train.micro_batch"]
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert step_keys(load_config(tmp_path / "c.yaml", ["train.micro_batch=8", "parallel.zero_stage= 2"])) == {
        "parallel.zero_stage": 2,
        "train.micro_batch": 8,
    }
    assert auto_keys(RunConfig()) == [], "nobody is surprised by a choice"


@pytest.mark.parametrize(
    ("text", "says"),
    [("automatic", "must be a whole number or auto, not text"), ("1.5", "must be a whole number or auto"),
     ("null", "must be a whole number or auto"), ("0", "must be above 0, or auto")],
)  # fmt: skip
def test_another_word_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.micro_batch='?{text}'?: {says}"):
        made(f"train.micro_batch={text}")


def test_pixels_that_depend_on_the_micro_batch_need_a_number() -> None:
    config = made("train.micro_batch=auto", "data.batch_bytes=100000000")
    with pytest.raises(ConfigError, match=r"train\.micro_batch=auto: by data\.batch_bytes=100000000"):
        check_config(config, World())
    check_config(replace(config, train=Train(steps=9)), World())


def test_one_rank_has_nobody_to_share_with() -> None:
    config = made(*BOTH, "train.global_batch=2")
    assert [each.parallel.zero_stage for each in choices(config, World())] == [0, 0]
    off = made(*BOTH, "train.global_batch=2", "parallel.offload_optimizer=true")
    assert {each.parallel.zero_stage for each in choices(off, World())} == {1, 2, 3}


@pytest.mark.parametrize(("asked", "trained", "elements"), [
    ("null", 86_000_000, 10_750_000), ("null", 632_000_000, 25_000_000), ("null", 5_500_000, 1_000_000),
    ("null", 40_001, 40_001), ("3000000", 86_000_000, 3_000_000), ("3000000", 40_000, 40_000),
])  # fmt: skip
def test_buckets_are_parts_of_the_model(asked: str, trained: int, elements: int) -> None:
    assert bucket_elements(made(f"parallel.bucket_elements={asked}"), trained) == elements
