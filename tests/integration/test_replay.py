"""A step of a run on two ranks, taken again in one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.integration.worlds import Launcher, losses, rows, trace
from vitscale.run_folder import BAD_INPUT, DONE


def test_a_step_taken_again(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """Sound, with pixels that are not finite, and after a learning rate that breaks the weights."""
    run = tmp_path / "runs" / "run"
    argv = ["pretrain", str(config), "parallel.zero_stage=2", "train.micro_batch=4", "checkpoint.every_steps=2"]
    launcher.run([*argv, "train.steps=4"], 2)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    said = launcher.run(["replay", str(run), "--step", "4"])
    found = re.search(r"step 4: loss (\S+), gradient norm \S+ \(the run had a loss of (\S+)\)\nevery value", said)
    assert found is not None, said
    assert float(found[1]) == pytest.approx(losses(run)[4], rel=1e-4)
    assert found[2] == f"{losses(run)[4]:.6g}"
    assert "has no checkpoint before it (2, 4)" in launcher.run(["replay", str(run), "--step", "2"], code=BAD_INPUT)

    # Micro-batches of 4: the third of step 3 holds the slots 8 to 11.
    world = launcher.request(1, argv=["replay", str(run), "--step", "3"], nan={"rank": 0, "calls": [3]})
    assert world.wait() == [DONE], world.output()
    found_first = f"pixel_values is not finite first, for 4 of its 4 samples: {', '.join(trace(run)[3][8:12])}"
    assert f"micro-batch 3: the input {found_first}" in world.output()
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert after == before, "replay wrote into the run's folder"

    broken = launcher.start([*argv, "train.steps=9", "optimizer.lr=1e30", "train.max_skipped_steps=2"], 2)
    assert DONE not in broken.wait()
    step = rows(run, "skipped.jsonl")[0]["step"]
    said = launcher.run(["replay", str(run), "--step", str(step)])
    assert re.search(rf"step {step}: loss nan, gradient norm nan, skipped", said), said
    assert re.search(r"micro-batch 1: the output of vit\.\S+ is not finite first, for [1-4] of its 4 samples: ", said)
    manifest = json.loads((run / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert manifest["state"]["job"] == "Job"
