"""A run that diverges goes back to a checkpoint before it, and leaves out the batches that it diverged at."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.integration.worlds import Launcher, losses, rows, trace, weights
from vitscale.run_folder import BAD_INPUT, STOPPED

STEPS = 20


def test_batches_left_out(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """NaN at steps 12 and 13; the new course has the bits of a run that never saw the batches of steps 11 to 13."""
    argv = ["pretrain", str(config), "train.micro_batch=16", "train.max_skipped_steps=2", "checkpoint.every_steps=2"]
    argv += [
        "checkpoint.asynchronous=false",
        "checkpoint.keep=1",
        "guard.rollback=true",
        "guard.rollback_steps=4",
        f"train.steps={STEPS}",
    ]
    run = tmp_path / "runs" / "run"
    world = launcher.request(1, argv=argv, nan={"rank": 0, "calls": [12, 13]})
    assert world.wait() == [STOPPED], world.output()
    assert "rolled back to step 8, and global batches 10 to 12 are left out" in world.output()
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000008"]
    (entry,) = json.loads((run / "rollbacks.json").read_text())
    assert (entry["step"], entry["back_to_step"], entry["skipped_batches"]) == (13, 8, [10, 11, 12])
    before = trace(run)
    # The batch that was left out, and not the one that takes its place, though the run has not gone on yet.
    said = launcher.run(["replay", str(run), "--step", "11", "--taken-back"])
    assert f"(the run had a loss of {losses(run)[11]:.6g})" in said
    assert float(re.search(r"step 11: loss (\S+),", said)[1]) == pytest.approx(losses(run)[11], rel=1e-4)
    said = launcher.run(["replay", str(run), "--step", "11"])
    assert "as it was then: --taken-back" in said
    replayed = float(re.search(r"step 11: loss (\S+), gradient norm \S+\n", said)[1])
    assert "went back from step 13 to 8" in launcher.run(
        ["replay", str(run), "--step", "8", "--taken-back"], code=BAD_INPUT
    )
    launcher.run(argv)
    assert replayed == pytest.approx(losses(run)[11], rel=1e-4)
    assert f"has {STEPS} steps" in launcher.run(["replay", str(run), "--step", "21"], code=BAD_INPUT)

    never = tmp_path / "runs" / "never"
    never.mkdir()
    shutil.copy(run / "rollbacks.json", never)
    launcher.run([*argv, "run.name=never"])
    assert losses(run) == losses(never)
    assert trace(run) == trace(never)
    for name, value in weights(run).items():
        np.testing.assert_array_equal(value, weights(never)[name], err_msg=name)
    assert [row["samples"] for row in rows(run)] == [16 * step for step in range(1, STEPS + 1)]
    assert [row["epoch"] for row in rows(run)][8:16] == [0, 1, 1, 1, 1, 1, 1, 2]  # batches 8, 9, 13 ... 17, 18

    after = list(trace(run).values())
    assert after[:10] == list(before.values())[:10]
    seen_before = {key for step in (11, 12, 13) for key in before[step]}  # of epoch 1, which now ends with step 15
    assert not seen_before & {key for step in range(10, 15) for key in after[step]}
    (never / "rollbacks.json").unlink()
    said = launcher.run([*argv, "run.name=never", "train.steps=22"], code=2)
    assert "was saved with the global batches 10, 11, 12 left out" in said
