"""A gradient that is not finite on one rank: every rank leaves the step out, and training goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.worlds import Launcher, World, losses, rows, trace
from vitscale.checkpoint.store import SoleRank, open_checkpoint
from vitscale.run_folder import BAD_INPUT, DONE

STEPS, BAD_STEP, BAD_RANK = 4, 2, 1


def start(launcher: Launcher, argv: list[str], bad: Iterable[int]) -> World:
    """As `Launcher.start` on 2 ranks, with NaN for pixels in these micro-batches (counted from 1) of one rank."""
    return launcher.request(2, argv=argv, nan={"rank": BAD_RANK, "calls": list(bad)})


def saved(run: Path, step: int) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, Any]]:
    """Every tensor of a checkpoint (weights, both moments, buffers), and its state."""
    checkpoint = open_checkpoint(run / "checkpoints" / f"step_{step:08d}", SoleRank())
    return {(kind, name): checkpoint.whole(kind, name) for kind, name in checkpoint.tensors}, checkpoint.state


def _argv(config: Path, stage: int, precision: str, micro: int) -> list[str]:
    argv = ["pretrain", str(config), f"parallel.zero_stage={stage}", f"train.precision={precision}"]
    argv += [f"train.micro_batch={micro}", f"train.steps={STEPS}"]
    return [*argv, "checkpoint.every_steps=1", "checkpoint.keep=10", "checkpoint.asynchronous=false"]


@pytest.mark.parametrize(
    ("stage", "precision", "accumulation"),
    [(0, "fp32", 1), (0, "fp32", 2), (1, "fp32", 1), (2, "fp32", 2), (3, "fp32", 1), (0, "bf16", 1), (2, "bf16", 1)],
)
def test_a_bad_step_is_left_out(
    launcher: Launcher, config: Path, tmp_path: Path, stage: int, precision: str, accumulation: int
) -> None:
    """Nothing of it is in the weights or in Adam's state, it is written down, and its samples are consumed."""
    bad_batch = (BAD_STEP - 1) * accumulation + 1  # the first of the step's micro-batches: the others are sound
    argv = _argv(config, stage, precision, micro=8 // accumulation)
    world = start(launcher, argv, [bad_batch])
    assert world.wait() == [DONE, DONE], world.output()
    run = tmp_path / "runs" / "run"

    (before, state_before), (after, state_after) = saved(run, BAD_STEP - 1), saved(run, BAD_STEP)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=str(name))
    assert state_after["adam_step"] == state_before["adam_step"] == BAD_STEP - 1
    assert (state_after["step"], state_after["skipped"]) == (BAD_STEP, 1)

    went_on, state_next = saved(run, BAD_STEP + 1)
    assert state_next["adam_step"] == BAD_STEP
    for name, value in went_on.items():
        assert np.isfinite(value).all(), name
        if name[0] == "exp_avg":
            assert not np.array_equal(value, after[name]), name

    assert [row["skipped_steps"] for row in rows(run)] == [int(step >= BAD_STEP) for step in range(1, STEPS + 1)]
    assert [row["samples"] for row in rows(run)] == [16 * step for step in range(1, STEPS + 1)]
    finite = {step for step, loss in losses(run).items() if math.isfinite(float(loss))}
    assert finite == set(range(1, STEPS + 1)) - {BAD_STEP}
    assert not math.isfinite(float(rows(run)[BAD_STEP - 1]["grad_norm"]))
    assert rows(run, "skipped.jsonl") == [{"step": BAD_STEP, "sample_keys": trace(run)[BAD_STEP]}]
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 1


@pytest.mark.parametrize("stage", [0, 2])
def test_too_many_bad_steps_in_a_row_stop_all_ranks(
    launcher: Launcher, config: Path, tmp_path: Path, stage: int
) -> None:
    argv = [*_argv(config, stage, "fp32", micro=8), "train.max_skipped_steps=2"]
    world = start(launcher, argv, range(1, 100))
    assert world.wait() == [BAD_INPUT, BAD_INPUT], world.output()
    run = tmp_path / "runs" / "run"
    said = json.loads((run / "exit.json").read_text())
    assert said["code"] == BAD_INPUT
    for text in (world.output(), said["reason"]):
        for words in ("step 2", "not finite in 2 steps in a row", "train.max_skipped_steps=2", "skipped.jsonl"):
            assert words in text
    assert [row["step"] for row in rows(run, "skipped.jsonl")] == [1, 2]
    assert all(np.isfinite(value).all() for value in saved(run, 1)[0].values())
    if stage == 0:  # the same again would come to the same end, another config may not
        assert "diverged at step 2, and would again with the same config" in launcher.run(argv, code=BAD_INPUT)
        launcher.run([*argv, "optimizer.lr=1e-3"])


def test_bad_steps_apart_do_not_add_up(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """The limit is of steps in a row; the first step of a run may be one of them, and its last."""
    argv = [*_argv(config, 0, "fp32", micro=8), "train.max_skipped_steps=2"]
    world = start(launcher, argv, [1, STEPS])
    assert world.wait() == [DONE, DONE], world.output()
    run = tmp_path / "runs" / "run"
    assert [row["skipped_steps"] for row in rows(run)] == [1, 1, 1, 2]
    assert {"loss.png"} == {path.name for path in (run / "figures").iterdir()}
    assert all(np.isfinite(value).all() for value in saved(run, STEPS)[0].values())
