"""Stopped, killed, moved to another world: the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.integration.worlds import Launcher, World, losses, rows, trace, weights
from vitscale.run_folder import BAD_INPUT, DONE, STOPPED

STEPS = 60
EPOCH_SAMPLES, BATCH, LANES = 150, 16, 4
EPOCH_STEPS = 9
full = pytest.mark.full


def _argv(config: Path, stage: int, ranks: int, *overrides: str) -> list[str]:
    micro = f"train.micro_batch={min(8, BATCH // ranks)}"
    return ["pretrain", str(config), f"parallel.zero_stage={stage}", micro, f"train.steps={STEPS}", *overrides]


def signal_at_step(world: World, run: Path, step: int, rank: int, number: signal.Signals, every: int = 1) -> None:
    """Send a signal to a rank once `step`, or the first one from there on that is logged, is logged."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") * every >= step:
            break
        time.sleep(0.002)
    os.kill(world.pids[rank], number)


def _assert_same(run: Path, unbroken: Path) -> None:
    assert losses(run) == losses(unbroken)
    assert trace(run) == trace(unbroken)
    mine, theirs = weights(run), weights(unbroken)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def _assert_once_an_epoch(run: Path) -> None:
    """Each sample at most once an epoch, and all but a tail smaller than B + L."""
    by_epoch: dict[int, Counter[str]] = {}
    for step, names in trace(run).items():
        by_epoch.setdefault((step - 1) // EPOCH_STEPS, Counter()).update(names)
    assert len(by_epoch) > 2
    for epoch, names in by_epoch.items():
        assert max(names.values()) == 1
        if epoch < max(by_epoch):
            assert len(names) > EPOCH_SAMPLES - (BATCH + LANES)


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(2, 2), (2, 3), (4, 0)] + [pytest.param(*world, marks=full) for world in ((2, 0), (2, 1), (4, 1), (4, 2), (4, 3))],
)
def test_stop_and_resume_is_bit_identical(
    launcher: Launcher, config: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    argv = _argv(config, stage, ranks)
    launcher.run([*argv, "run.name=unbroken"], ranks)
    run = tmp_path / "runs" / "run"
    for step in (5, 23):
        world = launcher.start(argv, ranks)
        signal_at_step(world, run, step, rank=ranks - 1, number=signal.SIGTERM)
        assert world.wait() == [STOPPED] * ranks, world.output()
    output = launcher.run(argv, ranks, code=DONE)
    assert "start: " in output
    _assert_same(run, tmp_path / "runs" / "unbroken")
    _assert_once_an_epoch(run)


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=full) for seed in (0, 1, *range(3, 10)))])
def test_killed_ranks(launcher: Launcher, config: Path, tmp_path: Path, seed: int) -> None:
    """SIGKILL of one rank at random steps, a chain of 5 across the epochs' borders; rows and saves at other steps."""
    ranks, stage, every = (2, 4)[seed % 2], seed % 4, 1 + seed % 3
    argv = _argv(config, stage, ranks, "checkpoint.every_steps=4", f"log.every_steps={every}")
    launcher.run([*argv, "run.name=unbroken"], ranks)
    run = tmp_path / "runs" / "run"
    chance = random.Random(seed)
    for number in range(5):
        world = launcher.start(argv, ranks)
        step = 8 * number + chance.randint(1, 8)
        signal_at_step(world, run, step, chance.randrange(ranks), signal.SIGKILL, every)
        codes = world.wait()
        assert -signal.SIGKILL in codes, world.output()
        assert all(codes), f"a survivor of a killed rank says that all is well: {codes}"
    launcher.run(argv, ranks)
    _assert_same(run, tmp_path / "runs" / "unbroken")
    _assert_once_an_epoch(run)


def test_other_worlds_and_stages(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """Stage 2 on 2 ranks, stage 3 on 4, stage 1 on 1, DDP on 2: one curve."""
    launcher.run(_argv(config, 0, 1, "run.name=unbroken"), 1)
    run = tmp_path / "runs" / "run"
    for step, ranks, stage in ((5, 2, 2), (17, 4, 3), (30, 1, 1)):
        world = launcher.start(_argv(config, stage, ranks), ranks)
        signal_at_step(world, run, step, 0, signal.SIGTERM)
        assert world.wait() == [STOPPED] * ranks, world.output()
    launcher.run(_argv(config, 0, 2), 2)
    unbroken = tmp_path / "runs" / "unbroken"
    assert trace(run) == trace(unbroken)
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-5)


@full
def test_sources_with_epochs_of_their_own(launcher: Launcher, config: Path, shards: Path, tmp_path: Path) -> None:
    """A mixture on 1 rank, and on 2, stopped and gone on with on 1 and 4: the same samples and rows."""
    one, *others = sorted(str(path) for path in shards.glob("*.tar"))
    sources = f"[{{pattern: '{one}', repeat: 2.5}}, {', '.join(repr(path) for path in others)}]"
    argv = ["pretrain", str(config), f"data.train={sources}", "train.steps=24"]
    launcher.run([*argv, "run.name=alone"])
    parts = [*argv, "parallel.zero_stage=2"]
    launcher.run([*parts, "train.steps=9"], ranks=2)
    launcher.run([*parts, "train.steps=17"])
    launcher.run(parts, ranks=4)
    alone, run = tmp_path / "runs" / "alone", tmp_path / "runs" / "run"
    assert trace(run) == trace(alone)
    epochs, expected = ([(row["epoch"], row["samples"]) for row in rows(each)] for each in (run, alone))
    assert epochs == expected
    seen = Counter(key for keys in trace(alone).values() for key in keys)
    of_one = {key for key in seen if key.startswith(f"{Path(one).stem}/")}
    assert np.mean([seen[key] for key in of_one]) > 2 * np.mean([seen[key] for key in seen.keys() - of_one])
    other = f"data.train={sources.replace('2.5', '2')}"
    said = launcher.run([*argv, "run.name=alone", "train.steps=30", other], code=2)
    assert "data.train's shares=[[None, 2.5]" in said


def test_a_grown_data_set(launcher: Launcher, config: Path, shards: Path, tmp_path: Path) -> None:
    """Refused, until it is asked for: then an epoch of all shards begins, and goes on over stops and other ranks."""
    few, run = tmp_path / "few", tmp_path / "runs" / "run"
    few.mkdir()
    paths = sorted(shards.glob("*.tar"))
    for path in paths[:2]:  # 80 samples: 5 steps an epoch, then 9
        shutil.copy(path, few)
    argv = [*_argv(config, 0, 1), f"data.train={few}/*.tar", "checkpoint.every_steps=6", "checkpoint.keep=9"]
    launcher.run([*argv, "train.steps=6"])
    for path in paths[2:]:
        shutil.copy(path, few)
    argv += ["train.steps=20"]
    said = launcher.run(argv, code=BAD_INPUT)
    assert f"was saved with other shards (2 new: {paths[2].stem}, {paths[3].stem}): " in said
    argv += ["data.when_changed=new_epoch"]
    said = launcher.run([*argv, "train.steps=12"], 2)
    assert "from step 7 on these are read, from the start of epoch 2: " in said
    assert "from step" not in launcher.run(argv)
    assert [row["epoch"] for row in rows(run)] == [0] * 5 + [1] + [2] * 9 + [3] * 5
    _assert_each_once(run, range(7, 16), 9 * BATCH)
    launcher.run([*argv, "run.name=straight", f"checkpoint.resume_from={run}/checkpoints/step_00000006"])
    straight = trace(tmp_path / "runs" / "straight")
    assert straight == {step: names for step, names in trace(run).items() if step > 6}


def _assert_each_once(run: Path, steps: range, samples: int) -> None:
    names = [name for step in steps for name in trace(run)[step]]
    assert len(set(names)) == len(names) == samples


def test_stop_file(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """A stop file from before the start is cleared; one made later stops the run, which takes it away."""
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "stop").touch()
    argv = [*_argv(config, 2, 2), "train.steps=2000"]
    world = launcher.start(argv, 2)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((run / "metrics.jsonl").exists() and rows(run)):
        time.sleep(0.01)
    assert not (run / "stop").exists()
    (run / "stop").touch()
    assert world.wait() == [STOPPED] * 2, world.output()
    assert not (run / "stop").exists()
    assert '"code": 3' in (run / "exit.json").read_text()
    reached = len(losses(run))
    assert 1 <= reached < 2000
    launcher.run([*argv, f"train.steps={reached + 5}"], 2)
    assert '"code": 0' in (run / "exit.json").read_text()
    assert len(losses(run)) == reached + 5


def test_killed_between_the_last_checkpoint_and_the_end(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """What the end of a run leaves is made by the next start where it is missing."""
    argv = [*_argv(config, 0, 2), "train.steps=3"]
    launcher.run(argv, 2)
    run = tmp_path / "runs" / "run"
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    launcher.run(argv, 2)
    assert (run / "model" / "model.safetensors").exists()
    assert '"steps": 3' in (run / "summary.json").read_text()


def test_done_run_says_so_and_goes_on_with_more_steps(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    argv = _argv(config, 0, 1)
    launcher.run(argv)
    summary = tmp_path / "runs" / "run" / "summary.json"
    written = summary.stat().st_mtime_ns
    assert "done: step 60 of 60" in launcher.run(argv)
    assert summary.stat().st_mtime_ns == written
    output = launcher.run([*argv, "train.steps=70"])
    assert "60 before, 70 now" in output
    assert sorted(losses(tmp_path / "runs" / "run")) == list(range(1, 71))
