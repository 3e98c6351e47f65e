"""Options that must not change what is learned: offloading, recomputing, compiling; and other places to start from."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.integration.test_objectives import GOLDEN
from tests.integration.test_resume import signal_at_step
from tests.integration.worlds import Launcher, losses, trace, weights
from vitscale.checkpoint.store import SoleRank, open_checkpoint
from vitscale.interop.pretrained import read_model
from vitscale.run_folder import BAD_INPUT

STEPS = 20


@pytest.fixture(scope="module")
def golden() -> dict[int, float]:
    """MAE's losses by step."""
    return dict(enumerate(json.loads(GOLDEN.read_text())["mae"], start=1))


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_optimizer(
    launcher: Launcher, config: Path, tmp_path: Path, golden: dict[int, float], stage: int
) -> None:
    """Adam on the CPU: trains, saves, and goes on from what it saved, bit-equal."""
    argv = ["pretrain", str(config), f"parallel.zero_stage={stage}", "train.micro_batch=8"]
    argv += ["parallel.offload_optimizer=true", "checkpoint.every_steps=10"]
    launcher.run(argv, ranks=2)
    run = tmp_path / "runs" / "run"
    assert losses(run) == pytest.approx(golden, rel=1e-5)
    whole = weights(run)

    shutil.rmtree(run / "checkpoints" / "step_00000020")
    assert "step_00000010, step 10 of 20" in launcher.run(argv, ranks=2)
    assert losses(run) == pytest.approx(golden, rel=1e-5)
    for name, value in weights(run).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_gradient_checkpointing(
    launcher: Launcher, config: Path, tmp_path: Path, golden: dict[int, float], ranks: int, stage: int
) -> None:
    argv = ["pretrain", str(config), "train.gradient_checkpointing=true", f"parallel.zero_stage={stage}"]
    launcher.run([*argv, "train.micro_batch=8"], ranks=ranks)
    assert losses(tmp_path / "runs" / "run") == pytest.approx(golden, rel=1e-5)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("objective", ["simmim", pytest.param("mae", marks=pytest.mark.full)])
def test_compiled_blocks(launcher: Launcher, config: Path, tmp_path: Path, objective: str) -> None:
    argv = ["pretrain", str(config), "train.steps=3", f"objective.name={objective}"]
    launcher.run([*argv, "run.name=plain"])
    launcher.run([*argv, "train.compile=true"])
    plain, compiled = losses(tmp_path / "runs" / "plain"), losses(tmp_path / "runs" / "run")
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert len(compiled) == 3


def test_lanes_that_are_not_written(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """The checkpoint keeps the number that they came to; fewer than there are ranks are told once."""
    argv = ["pretrain", str(config), "train.global_batch=4", "train.micro_batch=2", "train.steps=2"]
    output = launcher.run([*argv, "data.lanes=null"], ranks=2)
    assert output.count("warning: data.lanes=1 (of train.global_batch): fewer than the 2 ranks") == 1
    saved = json.loads((tmp_path / "runs/run/checkpoints/step_00000002/manifest.json").read_text())
    assert saved["state"]["order"]["data.lanes"] == 1
    output = launcher.run([*argv, "data.lanes=1", "train.steps=3"])
    assert "step 2 of 3" in output
    assert "warning" not in output


# ---- where a run starts from


@pytest.fixture(scope="module")
def source(launcher: Launcher, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished MAE run of one rank with checkpoints at steps 10 and 20."""
    from tests.integration.conftest import write_config

    folder = tmp_path_factory.mktemp("source")
    config = write_config(folder, shards, folder)
    launcher.run(["pretrain", str(config), "checkpoint.every_steps=10"])
    return folder / "run"


def test_resume_from(launcher: Launcher, config: Path, tmp_path: Path, source: Path) -> None:
    """A new run goes on from another's checkpoint, bit-equal to it; once it has its own, it takes that one."""
    checkpoint = source / "checkpoints" / "step_00000010"
    argv = ["pretrain", str(config), "run.name=other", f"checkpoint.resume_from={checkpoint}"]
    run = tmp_path / "runs" / "other"
    argv += ["checkpoint.every_steps=5"]
    output = launcher.run(argv)
    assert f"start: {checkpoint}, step 10 of {STEPS}" in output
    assert losses(run) == {step: loss for step, loss in losses(source).items() if step > 10}
    assert trace(run) == {step: keys for step, keys in trace(source).items() if step > 10}
    mine, theirs = weights(run), weights(source)
    for name, value in theirs.items():
        np.testing.assert_array_equal(mine[name], value, err_msg=name)
    assert sorted(path.name for path in (source / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]

    output = launcher.run([*argv, "train.steps=22"])
    assert f"start: {run / 'checkpoints' / 'step_00000020'}" in output
    assert sorted(losses(run)) == list(range(11, 23))


def test_moving_average(launcher: Launcher, config: Path, tmp_path: Path, source: Path) -> None:
    """It starts from the weights of a checkpoint that has none, and is what the model folder holds."""
    start = source / "checkpoints" / "step_00000010"
    argv = ["pretrain", str(config), f"checkpoint.resume_from={start}", "train.steps=12", "train.ema_decay=0.9"]
    launcher.run([*argv, "checkpoint.every_steps=1", "checkpoint.asynchronous=false", "parallel.zero_stage=2"], ranks=2)
    run = tmp_path / "runs" / "run"
    steps = [start, *(run / "checkpoints" / f"step_{step:08d}" for step in (11, 12))]
    before, one, two = (open_checkpoint(folder, SoleRank()) for folder in steps)
    model = read_model(run / "model").state
    assert two.shapes("ema") == two.shapes("param")
    for name in two.shapes("param"):
        first, second, third = (checkpoint.whole("param", name) for checkpoint in (before, one, two))
        expected = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third
        average = two.whole("ema", name)
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_array_equal(model[name].numpy(), average, err_msg=name)
        assert not np.array_equal(average, third), name


@pytest.mark.full
def test_resume_from_at_another_world_and_stage(launcher: Launcher, config: Path, tmp_path: Path, source: Path) -> None:
    argv = ["pretrain", str(config), f"checkpoint.resume_from={source / 'checkpoints' / 'step_00000010'}"]
    launcher.run([*argv, "parallel.zero_stage=3"], ranks=2)
    expected = {step: loss for step, loss in losses(source).items() if step > 10}
    assert losses(tmp_path / "runs" / "run") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("key", ["checkpoint.resume_from", "model.init_from"])
def test_start_that_is_not_there(launcher: Launcher, config: Path, tmp_path: Path, key: str) -> None:
    output = launcher.run(["pretrain", str(config), f"{key}={tmp_path}/nowhere"], ranks=2, code=BAD_INPUT)
    lines = [line for line in output.splitlines() if line.startswith("vitscale: error:")]
    assert len(lines) == 1, output
    assert "nowhere" in lines[0]
    assert "Traceback" not in output


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (3, "fp32"), (2, "bf16")])
def test_init_from(launcher: Launcher, config: Path, tmp_path: Path, source: Path, stage: int, precision: str) -> None:
    """A fresh run starts at step 0 with a saved model's weights: with lr 0 they are what it ends with."""
    argv = ["pretrain", str(config), f"model.init_from={source / 'model'}", f"parallel.zero_stage={stage}"]
    argv += [f"train.precision={precision}", "train.micro_batch=8", "train.steps=1", "optimizer.lr=0"]
    output = launcher.run(argv, ranks=2)
    assert f"start: weights of {source / 'model'}" in output
    assert "new here: nothing" in output
    mine, theirs = weights(tmp_path / "runs" / "run"), weights(source)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(mine[name], value, err_msg=name)
    assert trace(tmp_path / "runs" / "run")[1] == trace(source)[1]


def test_init_from_another_objective(launcher: Launcher, config: Path, tmp_path: Path, source: Path) -> None:
    """MAE's encoder under a new classification head; a checkpoint of the run's own goes before init_from."""
    argv = ["pretrain", str(config), f"model.init_from={source / 'model'}", "objective.name=classification"]
    argv += ["model.position_embeddings=sincos", "optimizer.lr=0", "train.steps=1"]
    output = launcher.run(argv)
    (new,) = (line for line in output.splitlines() if line.startswith("  new here: "))
    assert new == "  new here: classifier.bias, classifier.weight"
    mine, theirs = weights(tmp_path / "runs" / "run"), weights(source)
    encoder = {name for name in mine if name.startswith("vit.")}
    assert len(mine) == len(encoder) + 2
    for name in encoder:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert "start: weights of" not in launcher.run([*argv, "train.steps=2"])


def test_init_from_another_shape(launcher: Launcher, config: Path, source: Path) -> None:
    argv = ["pretrain", str(config), f"model.init_from={source / 'model'}", "model.num_hidden_layers=3"]
    output = launcher.run(argv, ranks=2, code=BAD_INPUT)
    assert output.count("vitscale: error:") == 1
    assert "vit.encoder.layers.2." in output


@pytest.mark.full
def test_stopped_with_everything_on(launcher: Launcher, config: Path, tmp_path: Path, golden: dict[int, float]) -> None:
    """Offloaded, recomputed and accumulated under ZeRO-3: stopped by TERM, then on to the end on the same curve."""
    argv = ["pretrain", str(config), "parallel.zero_stage=3", "parallel.offload_optimizer=true"]
    argv += ["train.gradient_checkpointing=true", "train.micro_batch=4"]
    world = launcher.start(argv, 2)
    signal_at_step(world, tmp_path / "runs" / "run", 4, rank=1, number=signal.SIGTERM)
    assert world.wait() == [3, 3], world.output()
    launcher.run(argv, ranks=2)
    assert losses(tmp_path / "runs" / "run") == pytest.approx(golden, rel=1e-5)
