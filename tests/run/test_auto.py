"""What a start keeps of the last one's choice, and what it does where it cannot; one rank, in this process."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tests.integration.test_auto import large
from vitscale.config.schema import AUTO, RunConfig
from vitscale.config.step import step_keys, with_step
from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import ConfigError
from vitscale.run.auto import as_before, settle
from vitscale.run_folder import RunFolder
from vitscale.world import World


def start(folder: RunFolder, config: RunConfig) -> RunConfig:
    return settle(config, World(), ProcessRanks(timedelta(seconds=60)), torch.device("cpu"), folder)


def test_a_choice_is_kept_while_it_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = RunFolder(tmp_path), large(batch=12)
    assert as_before(config, folder) == config
    assert step_keys(start(folder, config)) == {"parallel.zero_stage": 0, "train.micro_batch": 12}
    assert "; the activations of a trial took " in capsys.readouterr().out
    assert as_before(config, folder) == with_step(config, 0, 12)
    folder.auto.write_text(json.dumps({"parallel.zero_stage": 0, "train.micro_batch": 3, "ratio": 1.5}))
    assert start(folder, config).train.micro_batch == 3
    assert capsys.readouterr().out.count("; kept from the last start\n") == 1
    assert json.loads(folder.auto.read_text())["ratio"] == 1.5
    even = replace(config, augment=replace(config.augment, mixup=0.8))
    assert start(folder, even).train.micro_batch == 12
    said = capsys.readouterr().out
    assert "the last start had parallel.zero_stage=0 train.micro_batch=3, which these keys and ranks do not" in said


def test_a_choice_that_needs_more_than_there_is_now_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = RunFolder(tmp_path), large(batch=12)
    folder.auto.write_text(json.dumps({"parallel.zero_stage": 0, "train.micro_batch": 12, "ratio": 1e9}))
    assert start(folder, config).train.micro_batch == 12, "by a new trial"
    assert ": chosen anew\n" in capsys.readouterr().out
    assert json.loads(folder.auto.read_text())["ratio"] < 100


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"train.micro_batch": 3}', "null"])
def test_a_record_that_tells_nothing_is_as_none(tmp_path: Path, content: str) -> None:
    folder, config = RunFolder(tmp_path), large(batch=2)
    folder.auto.write_text(content)
    assert as_before(config, folder) == config


def test_nothing_is_looked_at_where_nothing_is_auto(tmp_path: Path) -> None:
    config = with_step(large(batch=2), 0, 1)
    assert start(RunFolder(tmp_path / "not there"), config) is config


def test_only_the_stage_is_planned_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_step(large(batch=2), AUTO, 2)
    assert start(RunFolder(tmp_path), config).parallel.zero_stage == 0
    assert "auto: parallel.zero_stage=0: " in (said := capsys.readouterr().out)
    assert said.endswith("; planned\n")


def test_a_model_that_fits_nowhere_is_refused_with_what_would(tmp_path: Path) -> None:
    config = large(batch=1)
    huge = replace(config, model=replace(config.model, hidden_size=65536, intermediate_size=262144))
    with pytest.raises(ConfigError, match=r"train\.micro_batch=auto: nothing fits into [\d.]+ GB .*take more memory"):
        start(RunFolder(tmp_path), huge)


def test_a_batch_whose_divisors_are_few_is_told_with_one_nearby(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a prime share, which fits nowhere as a whole, there is only 1."""
    prime = large(batch=1_000_003)
    assert start(RunFolder(tmp_path), prime).train.micro_batch == 1
    said = capsys.readouterr().out
    assert "; warning: few numbers divide the 1,000,003 images of a rank" in said
    near, micro = map(int, re.findall(r"of train\.global_batch=(\d+) it would be (\d+)\n", said)[0])
    assert abs(near / 1_000_003 - 1) < 0.05
    assert micro >= 16
    assert near % micro == 0
    start(RunFolder(tmp_path / "even"), large(batch=12))
    assert "warning" not in capsys.readouterr().out
