"""`auto`: runs that choose their stage and micro-batch, archive and keep them; less memory, less chosen."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.worlds import Launcher, losses
from vitscale.config.load import load_config
from vitscale.config.schema import AUTO, Model, Objective, RunConfig, Train
from vitscale.config.step import step_keys
from vitscale.engine.ranks import joined
from vitscale.engine.room import Room, room
from vitscale.planning.plan import Cluster, Planner
from vitscale.run.auto import settle, tried
from vitscale.run_folder import RunFolder
from vitscale.world import read_world

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("verb", "stage", "asked"),
    [("pretrain", 0, "auto"), *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ("pretrain", 1, "1"), ("pretrain", 3, "3"), ("finetune", 2, "2")))],
)  # fmt: skip
def test_what_is_chosen_is_archived_kept_and_trains_the_same(
    launcher: Launcher, config: Path, tmp_path: Path, verb: str, stage: int, asked: str
) -> None:
    run, written = tmp_path / "runs" / "run", tmp_path / "runs" / "written"
    argv = [verb, str(config), "train.steps=4", "checkpoint.every_steps=2"]
    auto = [*argv, f"parallel.zero_stage={asked}", "train.micro_batch=auto"]
    said = launcher.run(auto, ranks=2)
    assert "auto: " in said
    assert "; the activations of a trial took " in said
    chosen = {"parallel.zero_stage": stage, "train.micro_batch": 8}
    assert step_keys(load_config(run / "config.yaml")) == chosen
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    said = launcher.run(auto, ranks=2)
    assert said.count("; kept from the last start") == 1
    assert "config: train.micro_batch was" not in said
    assert step_keys(load_config(run / "config.yaml")) == chosen
    launcher.run([*argv, f"parallel.zero_stage={stage}", "train.micro_batch=4", "run.name=written"], ranks=2)
    assert losses(run) == pytest.approx(losses(written), rel=1e-5)
    assert len(losses(run)) == 4


def test_finetuning_chooses_too(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    argv = ["finetune", str(config), "train.steps=1", "train.micro_batch=auto", "parallel.zero_stage=2"]
    assert "auto: train.micro_batch=8: " in launcher.run(argv, ranks=2)
    assert load_config(tmp_path / "runs" / "run" / "config.yaml").train.micro_batch == 8


# ---- with a limit of memory, on two ranks


def large(batch: int = 128) -> RunConfig:
    """Some 2.5 MB of activations an image."""
    model = Model(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=64,
                  patch_size=4, num_labels=3)  # fmt: skip
    train = Train(global_batch=batch, micro_batch=AUTO, steps=1)
    return RunConfig(model=model, objective=Objective(name="classification"), train=train)


def leave(spare: int) -> None:
    """Let this process have no more than so many further bytes."""
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, resource.RLIM_INFINITY))


def choose(folder: str) -> dict[str, Any]:
    """What two ranks settle on: without a limit, with one on rank 1, again with twice as much there, and with one that
    nothing fits in."""
    config, world, run = large(), read_world(), RunFolder(Path(folder))
    results: dict[str, Any] = {}
    with joined(world, 60) as ranks:
        results["free"] = settle(config, world, ranks, CPU, run).train.micro_batch
        ranks.barrier()
        if world.rank == 1:
            leave(170_000_000)
        results["source"] = room(world, CPU).source
        results["limited"] = settle(config, world, ranks, CPU, run).train.micro_batch
        if world.rank == 1:
            leave(340_000_000)
        results["again"] = settle(config, world, ranks, CPU, run).train.micro_batch
        if world.rank == 1:
            leave(1_000_000)
        try:
            settle(config, world, ranks, CPU, run)
        except ValueError as error:
            results["refused"] = str(error)
        ranks.barrier()
    return results


def test_the_rank_with_the_least_memory_decides(launcher: Launcher, tmp_path: Path) -> None:
    one, other = launcher.call(choose, 2, folder=str(tmp_path))
    assert other["source"] == "that the limit of address space (ulimit -v) leaves"
    assert one.keys() == other.keys()
    for key in one.keys() - {"source"}:
        assert one[key] == other[key]
    assert one["free"] == 64
    assert 1 <= one["limited"] == one["again"] <= 32
    assert "train.micro_batch=auto: nothing fits into 1 MB that the limit of address space" in one["refused"]
    assert "on rank 1, which has the least" in one["refused"]


def try_out() -> list[Any]:
    """Trials of rank 1 under a limit that the plan is not told of."""
    config, world = large(), read_world()
    there = Room(10**11, "as told")
    with joined(world, 60) as ranks:
        planner = Planner(config, Cluster.of(world, there.bytes))
        if world.rank == 1:
            leave(150_000_000)
        chosen, ratio, why = tried(planner, there, ranks, CPU)
        ranks.barrier()
        return [chosen.config.train.micro_batch, ratio, why]


def test_a_trial_that_runs_out_of_memory_lowers_the_choice(launcher: Launcher) -> None:
    one, other = launcher.call(try_out, 2)
    assert one == other
    micro, ratio, why = one
    assert 1 <= micro <= 32
    assert why.startswith("a trial of 64 ran out of memory; ")
    assert 1 <= ratio < 2
