"""A bit that changes in one rank's memory: found before it is saved."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.worlds import Launcher, losses
from vitscale.run_folder import STOPPED


def test_a_flipped_bit_is_not_saved(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    argv = ["pretrain", str(config), "train.micro_batch=8", "train.steps=4", "checkpoint.every_steps=1",
            "checkpoint.asynchronous=false"]  # fmt: skip
    world = launcher.request(2, argv=argv, flip={"rank": 1, "step": 3})
    assert world.wait() == [STOPPED, STOPPED], world.output()
    run = tmp_path / "runs" / "run"
    reason = json.loads((run / "exit.json").read_text())["reason"]
    assert "step 3: " in reason
    assert ": not the same bits as each other in 1 of " in reason
    newest = max(path.name for path in (run / "checkpoints").glob("step_*"))
    assert newest == "step_00000002"
    assert "start: " in launcher.run(argv, 2)
    assert list(losses(run)) == [1, 2, 3, 4]
