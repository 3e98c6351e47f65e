"""`vitscale bench sharding`: all contenders on two ranks, one alone, and what is made of those that fail."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.integration.worlds import Launcher
from vitscale.bench import sharding
from vitscale.bench.gpu_suite.sharding import tiny_config
from vitscale.bench.sharding import DDP, FSDP2, STAGES, compared, measured
from vitscale.config.schema import Parallel, RunConfig
from vitscale.models.auto import build_model
from vitscale.world import World, enter


@pytest.mark.full
def test_all_contenders_are_measured_on_two_ranks(launcher: Launcher) -> None:
    sizes = ["--preset", "Ti", "--objective", "classification", "--batch", "1", "--steps", "1", "--rounds", "1"]
    world = launcher.start(["bench", "sharding", *sizes], ranks=2)
    assert world.wait() == [0, 0], world.output()
    (line,) = [line for line in world.output().splitlines() if line.startswith('{"bench"')]
    result = json.loads(line)
    assert result["left_out"] == {}
    assert list(result["contenders"]) == [*STAGES, FSDP2]
    assert all(one["images_per_second"] > 0 for one in result["contenders"].values())
    assert all(result["contenders"][name]["allocated_mb"] > 0 for name in STAGES)
    losses = [one["losses"] for one in result["contenders"].values()]
    for after in range(2):  # at the start, and of weights that were stepped
        assert [one[after] for one in losses] == pytest.approx([losses[0][after]] * len(losses), rel=0.01)


def of_one(name: str, fault: str | None = None, accumulated: int = 1) -> dict[str, Any]:
    """What is told of a contender in a process of its own; fault: what comes in the way of its steps."""

    def fail(*_: object) -> Any:
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        os.kill(os.getpid(), signal.SIGKILL)

    if fault:
        sharding._steps = fail
    return measured(name, accumulating(accumulated), 1, enter())


def accumulating(times: int) -> RunConfig:
    config = tiny_config()
    return replace(config, train=replace(config.train, global_batch=times * config.train.micro_batch))


def test_accumulating_takes_more_images_a_step(launcher: Launcher) -> None:
    """The same images again: the same losses, also after a step."""
    figures = {name: launcher.call(of_one, name=name, accumulated=2) for name in ("ZeRO-2", FSDP2)}
    result = compared(figures, accumulating(2))
    once = launcher.call(of_one, name=FSDP2)[0]
    for name in ("ZeRO-2", FSDP2):
        contender = result["contenders"][name]
        assert contender["losses"] == pytest.approx(once["losses"], rel=1e-3)
        assert contender["images_per_second"] == pytest.approx(2 * 8 / contender["seconds"][0])


def test_what_a_run_refuses_is_left_out() -> None:
    config = replace(accumulating(2), parallel=Parallel(zero_stage=1))
    (told,) = sharding.measure(config, False, 1, World())
    assert "set parallel.zero_stage=2" in told["error"]


def test_alone_each_is_a_process_and_what_fails_is_named_with_its_plan(launcher: Launcher) -> None:
    figures = {DDP: launcher.call(of_one, name=FSDP2)}
    assert figures[DDP][0]["seconds"] > 0
    for name, fault in (("ZeRO-2", "memory"), ("ZeRO-3", "kill")):
        figures[name] = launcher.call(of_one, name=name, fault=fault)
    assert figures["ZeRO-2"][0]["out_of_memory"]
    assert not figures["ZeRO-3"][0]["out_of_memory"]
    result = compared(figures, tiny_config())
    assert list(result["contenders"]) == [DDP]
    memory, killed = (result["left_out"][name] for name in ("ZeRO-2", "ZeRO-3"))
    assert memory.startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.; planned: 0.00 GB")
    assert killed.startswith("its process ended with signal 9; planned: ")


def test_speed_is_seen_against_ddp_and_another_loss_is_a_mismatch() -> None:
    def turn(loss: float, seconds: float, **more: int) -> dict[str, Any]:
        return {"losses": [loss, loss], "seconds": seconds, **more}

    result = compared({
        DDP: [turn(2.0, 0.2, planned_bytes=90, allocated_bytes=100)] * 2,
        "ZeRO-2": [turn(2.01, 0.4)] * 2,
        FSDP2: [turn(2.0, 0.2), turn(2.03, 0.2)],
    }, tiny_config(), peak_tflops=1e-3)  # fmt: skip
    assert result["contenders"][DDP]["accuracy"] == pytest.approx(0.9)
    assert result["contenders"][DDP]["images_per_second"] == pytest.approx(8 / 0.2)
    flops = build_model(tiny_config()).flops_per_image()
    assert result["contenders"][DDP]["utilization"] == pytest.approx(8 / 0.2 * flops / 1e9)
    assert result["contenders"]["ZeRO-2"]["ratio"] == pytest.approx(0.5)
    assert result["left_out"] == {FSDP2: "the loss of its first step is 2.03000, others' 2.00000: more than 1% apart"}
    alone = compared({DDP: [{"error": "none", "planned_bytes": 1}], "ZeRO-3": [turn(1.0, 0.1)]}, tiny_config())
    assert alone["contenders"]["ZeRO-3"]["ratio"] is None, "nothing to be seen against"
