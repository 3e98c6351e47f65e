"""A run that diverges goes back to a checkpoint before it, and leaves out the batches that it diverged at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from tests.integration.worlds import Launcher, losses, rows, trace, weights
from vitscale.run_folder import STOPPED

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
    launcher.run(argv)

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
