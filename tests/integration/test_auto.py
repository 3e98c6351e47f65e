"""`auto`: runs that choose their stage and micro-batch, archive and keep them; less memory, less chosen."""

from __future__ import annotations

import json
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.worlds import Launcher, losses
from vitscale.cli import main
from vitscale.config.load import load_config
from vitscale.config.schema import AUTO, Model, Objective, RunConfig, Train
from vitscale.config.step import step_keys, with_step
from vitscale.engine.engine import Engine
from vitscale.engine.ranks import joined
from vitscale.engine.room import Room, room
from vitscale.errors import ConfigError, VitscaleError
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.planning.plan import Cluster, Planner
from vitscale.run.auto import prove, settle, tried
from vitscale.run.job import Job
from vitscale.run.pretrain import run_locked
from vitscale.run.session import Session
from vitscale.run_folder import BAD_INPUT, DONE, STOPPED, RunFolder, exit_code
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
        if world.is_main:
            prove(run)
        ranks.barrier()
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


def recommended(said: str, config: RunConfig) -> RunConfig | None:
    """The config with what an error recommends."""
    keys = dict(re.findall(r"(\S+)=(\S+)", said.partition("and is the fastest: ")[2]))
    if not keys:
        return None
    again = {"true": True, "false": False}.get(keys["train.gradient_checkpointing"], "selective")
    found = with_step(config, int(keys["parallel.zero_stage"]), int(keys["train.micro_batch"]))
    return replace(found, train=replace(found.train, gradient_checkpointing=again))


def try_in_vain() -> list[Any]:
    """Trials for none of which there is memory, not for that of one image, of which the plan is not told: what is said,
    and the bytes that the plan has for one image, and for what is recommended."""
    config = large(16)
    config = replace(config, model=replace(config.model, image_size=192, num_hidden_layers=16))
    there, said = Room(10**11, "as told"), "something fits"
    with joined(read_world(), 60) as ranks:
        planner = Planner(config, Cluster.of(read_world(), there.bytes))
        planner.fastest()  # what it counts is kept, and here there is room for it
        leave(20_000_000)
        try:
            tried(planner, there, ranks, CPU)
        except ConfigError as error:
            said = str(error)
        better = recommended(said, config)
        return [
            said,
            *(each and planner.estimate(each).memory.total_bytes for each in (with_step(config, 0, 1), better)),
        ]


@pytest.mark.full
def test_every_size_is_tried_and_none_of_those_recommended(launcher: Launcher) -> None:
    ((said, one, better),) = launcher.call(try_in_vain, 1)
    tried = "; ".join(f"a trial of {micro} ran out of memory" for micro in (16, 8, 4, 2, 1))
    assert said.startswith(f"train.micro_batch=auto: nothing fits into 100.0 GB as told: {tried}; by `vitscale plan` ")
    assert better is None or better < one


# ---- runs whose memory is short only once they train


class Tight(Job):
    """A run with less memory than its start has seen."""

    def engine(self, session: Session, model: ViTPreTrainedModel) -> Engine:
        leave(150_000_000)
        return super().engine(session, model)


LARGE = [
    "objective.name=classification", "model.hidden_size=64", "model.intermediate_size=256", "model.image_size=64",
    "train.global_batch=128", "train.steps=2",
]  # fmt: skip


def train(config: str, tight: bool) -> dict[str, Any]:
    """Start a run by auto, with too little memory from its engine on or not: its exit code and what it has kept."""
    given = load_config(Path(config), [*LARGE, "train.micro_batch=auto"])
    job = (Tight if tight else Job)(given, read_world())
    try:
        code = run_locked(job)
    except VitscaleError as error:
        code = exit_code(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    return {"code": code, "reason": (job.folder.read_exit() or {})["reason"], **json.loads(job.folder.auto.read_text())}


@pytest.mark.full
def test_a_choice_that_trains_out_of_memory_is_not_kept(launcher: Launcher, config: Path) -> None:
    """The next start chooses less; what has trained and saved is kept."""
    (first,) = launcher.call(train, config=str(config), tight=True)
    assert first["code"] == STOPPED, first["reason"]
    assert "ran out of memory" in first["reason"]
    assert "the same command now chooses less" in first["reason"]
    assert not first["proven"]
    (second,) = launcher.call(train, config=str(config), tight=False)
    assert second["code"] == DONE, second["reason"]
    assert second["proven"]
    assert second["train.micro_batch"] <= first["train.micro_batch"] // 2


def limited(argv: list[str], spare: int) -> int:
    """`vitscale ARGV` where only so many more bytes can be had."""
    leave(spare)
    code = main(argv)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    return code


@pytest.mark.full
def test_a_step_that_a_limit_of_memory_ends_is_told_what_would_fit(
    launcher: Launcher, config: Path, tmp_path: Path
) -> None:
    argv = ["pretrain", str(config), *LARGE, "model.image_size=128", "train.micro_batch=128"]
    assert launcher.call(limited, argv=argv, spare=700_000_000) == [BAD_INPUT]
    reason = json.loads((tmp_path / "runs" / "run" / "exit.json").read_text())["reason"]
    assert reason.startswith("train.micro_batch=128: ran out of memory (")
    assert "that the limit of address space (ulimit -v) leaves; lower it" in reason
    keys = re.findall(r"fastest: parallel.zero_stage=0 train.micro_batch=(\d+) train.grad", reason)
    assert keys, reason
    assert int(keys[0]) < 128
