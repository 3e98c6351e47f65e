"""Golden losses: a refactor keeps the numbers.

After a change that is meant to move them: `python -m tests.integration.test_objectives` writes them
anew, and the commit says why.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.integration.worlds import Launcher, losses, rows, trace

GOLDEN = Path(__file__).with_name("golden_losses.json")
OBJECTIVES = ("mae", "simmim", "classification", "multitask")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_golden_losses(launcher: Launcher, config: Path, tmp_path: Path, objective: str) -> None:
    """20 steps of each objective on one rank, fp32, decoded by Pillow."""
    launcher.run(["pretrain", str(config), f"objective.name={objective}"])
    run = tmp_path / "runs" / "run"
    golden = json.loads(GOLDEN.read_text())[objective]
    assert list(losses(run).values()) == pytest.approx(golden, rel=2e-5)
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("objective", ["simmim", "classification", "multitask"])
def test_objective_on_two_sharded_ranks(launcher: Launcher, config: Path, tmp_path: Path, objective: str) -> None:
    """Every objective under ZeRO-3, where a parameter used from the wrong module would show."""
    argv = ["pretrain", str(config), f"objective.name={objective}", "parallel.zero_stage=3"]
    launcher.run(argv, ranks=2)
    golden = json.loads(GOLDEN.read_text())[objective]
    assert list(losses(tmp_path / "runs" / "run").values()) == pytest.approx(golden, rel=2e-5)


AUGMENTED = (
    "objective.name=classification", "augment.preset=randaug", "augment.three_augment=true", "augment.repeats=2",
    "augment.color_jitter=[0.3,0.3,0.3,0.1]", "augment.steps=[{name: rotate, probability: 0.3}]", "data.lanes=4",
    "train.steps=6", "checkpoint.every_steps=3", "log.trace=true",
)  # fmt: skip


def test_augmented_images_are_the_same_on_any_ranks(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """Everything random at once, mixed pairs and repeated views too: one rank, two of several micro-batches, four."""
    found = []
    for ranks, micro, stage in ((1, 16, 0), (2, 4, 2), (4, 4, 0)):
        name = f"augmented-{ranks}"
        sizes = (f"run.name={name}", f"train.micro_batch={micro}", f"parallel.zero_stage={stage}")
        launcher.run(["pretrain", str(config), *AUGMENTED, *sizes], ranks=ranks)
        run = tmp_path / "runs" / name
        found.append((list(losses(run).values()), trace(run)))
    assert len(found[0][0]) == 6
    for curve, order in found[1:]:
        assert curve == pytest.approx(found[0][0], rel=1e-5)
        assert order == found[0][1]


def test_bf16_trains(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """bf16 at stage 0 (autocast) and 2 (bf16 weights over fp32 masters) stays near fp32."""
    golden = json.loads(GOLDEN.read_text())["mae"]
    for stage in (0, 2):
        name = f"bf16-{stage}"
        argv = ["pretrain", str(config), "train.precision=bf16", f"parallel.zero_stage={stage}", f"run.name={name}"]
        launcher.run(argv, ranks=2)
        run = tmp_path / "runs" / name
        assert list(losses(run).values()) == pytest.approx(golden, rel=0.02)
        assert rows(run)[-1]["skipped_steps"] == 0


def write_golden(folder: Path) -> None:
    """Measure the golden losses anew, in an empty folder."""
    from tests.integration.conftest import make_shards, write_config

    launcher = Launcher(folder)
    config = write_config(folder, make_shards(folder), folder)
    golden = {}
    for name in OBJECTIVES:
        launcher.run(["pretrain", str(config), f"objective.name={name}", f"run.name={name}"])
        golden[name] = list(losses(folder / name).values())
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    launcher.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write_golden(Path(scratch))
