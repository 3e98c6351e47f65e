"""`vitscale plan`: its figures against those of a GPU, its JSON, what it recommends and refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.bench.peers import run_config
from vitscale.cli import main
from vitscale.config.schema import AUTO, Parallel, RunConfig, Train
from vitscale.config.step import choices, with_step
from vitscale.errors import ConfigError
from vitscale.planning.command import _scaling as told
from vitscale.planning.command import as_text
from vitscale.planning.gpus import GPUS, gpu_of
from vitscale.planning.plan import Cluster, Planner, plan, preferred, scaling
from vitscale.run_folder import BAD_INPUT, DONE

RECIPE = Path(__file__).parents[2] / "configs" / "pretrain_vit_b_mae.yaml"
# Images/s and GiB of vitscale's compiled steps on one H200, stage d of the GPU suite (docs/measurements.md).
MEASURED = {
    ("mae", "B", 256): (4311, 13.1), ("mae", "L", 128): (1303, 13.2), ("mae", "H", 64): (493, 16.6),
    ("classification", "B", 256): (3397, 16.4), ("classification", "L", 128): (1123, 24.1),
    ("classification", "H", 64): (401, 30.0),
}  # fmt: skip


def planner_of(objective: str, preset: str, batch: int, gpus: int = 1, **train: Any) -> Planner:
    keys = {"precision": "bf16", "compile": True, "micro_batch": batch, "global_batch": batch * gpus, "steps": 1000}
    config = replace(run_config(preset, objective), train=Train(**keys | train))
    return Planner(config, Cluster(GPUS["h200"], gpus))


@pytest.mark.parametrize(
    ("objective", "preset", "batch"),
    [key if key[1] == "B" else pytest.param(*key, marks=pytest.mark.full) for key in MEASURED],
)
def test_the_steps_of_one_h200(objective: str, preset: str, batch: int) -> None:
    planner = planner_of(objective, preset, batch)
    estimate, (rate, gibibytes) = planner.estimate(planner.config), MEASURED[objective, preset, batch]
    # They were no engine's: plain steps, on one batch, whose gradients come as the activations go.
    assert batch / replace(estimate.step, augment=0.0).total == pytest.approx(rate, rel=0.1)
    alike = estimate.memory.allocated_bytes - estimate.memory.gradients - estimate.memory.inputs
    assert alike == pytest.approx(gibibytes * 2**30, rel=0.1)


def test_an_engines_memory_on_one_h200() -> None:
    """GiB of stage c of the GPU suite, by ZeRO stage: ViT-B's MAE, its buckets of 25 million."""
    planner = planner_of("mae", "B", 256)
    for stage, gibibytes in enumerate((13.5, 12.6, 12.6, 12.9)):
        config = replace(planner.config, parallel=Parallel(zero_stage=stage, bucket_elements=25_000_000))
        planned = planner.estimate(config).memory.allocated_bytes
        assert planned == pytest.approx(gibibytes * 2**30, rel=0.07)


def test_a_fed_run_on_one_h200() -> None:
    """Images/s of stage c: the step of stage d, and the next batch augmented beside it."""
    planner = planner_of("mae", "B", 256)
    assert planner.estimate(planner.config).images_per_second == pytest.approx(3445, rel=0.1)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planner_of("mae", "Ti", 64, gpus=8)


def test_a_plan_adds_up(planner: Planner) -> None:
    found = plan(planner, image_kb=100.0)
    rate, memory, step = found["images_per_second"], found["memory"], found["step_seconds"]
    parts = ("weights", "masters", "gradients", "moments", "ema", "buckets", "activations", "inputs", "slack")
    assert sum(memory[name] for name in parts) == memory["total_bytes"]
    assert rate == pytest.approx(8 * 64 / step["total"])
    assert found["run"]["hours"] == pytest.approx(1000 * step["total"] / 3600)
    assert found["run"]["gpu_hours"] == pytest.approx(8 * found["run"]["hours"])
    assert found["loader"]["bytes_per_second_a_node"] == pytest.approx(rate * 100e3)
    save = found["checkpoint"]
    assert save["bytes"] == 12 * found["parameters"]
    between = save["hours_between_failures"] * 3600
    assert save["young_daly_seconds"] == pytest.approx(math.sqrt(2 * save["save_seconds"] * between))
    assert save["most_available_seconds"] > save["young_daly_seconds"]
    assert 0 < found["mfu"] < 1


def test_a_checkpoint_has_what_is_trained_thrice() -> None:
    planner = planner_of("classification", "Ti", 64, freeze=-1, ema_decay=0.9)
    found = plan(planner)
    assert found["trained_parameters"] == 193 * 1000
    assert found["checkpoint"]["bytes"] == 4 * found["parameters"] + 12 * found["trained_parameters"]


def test_what_an_offloaded_optimizer_takes_is_said() -> None:
    planner = planner_of("mae", "Ti", 64, gpus=16)
    offloaded = replace(planner.config, parallel=Parallel(zero_stage=2, offload_optimizer=True))
    found = plan(Planner(offloaded, planner.cluster))
    share = found["parameters"] / 16
    assert found["offload"]["host_bytes_a_rank"] == pytest.approx((4 + 8 + 4 + 2) * share)
    assert found["offload"]["host_bytes_a_node"] == pytest.approx(8 * 18 * share)
    text = as_text(found | {"measured": None})
    assert f"offloaded optimizer: {found['step_seconds']['offload']:.3f} s of the step" in text
    assert plan(planner)["offload"] is None


def test_what_is_recommended_fits_and_is_no_slower(planner: Planner) -> None:
    now, fastest = planner.estimate(planner.config), planner.fastest()
    assert fastest is not None
    assert fastest.fits
    assert fastest.images_per_second >= 0.98 * now.images_per_second
    small = Planner(planner.config, replace(planner.cluster, gpu=replace(GPUS["h200"], memory_gb=2.0)))
    tight = small.fastest()
    assert tight is not None
    assert tight.memory.total_bytes <= 2e9
    assert tight.config.train.micro_batch < 64 or tight.config.train.gradient_checkpointing
    none = Planner(planner.config, replace(planner.cluster, gpu=replace(GPUS["h200"], memory_gb=0.5)))
    assert none.fastest() is None


def test_the_fastest_is_told_with_accumulation_and_how_much_more_fits(planner: Planner) -> None:
    small = Planner(planner.config, replace(planner.cluster, gpu=replace(GPUS["h200"], memory_gb=2.0)))
    found = plan(small)
    best, told_of = found["fastest"], as_text(found | {"measured": None})
    assert best["micro_batch"] * best["accumulation"] == 64
    largest = with_step(small.config, best["zero_stage"], best["largest_micro_batch"])
    kind = best["gradient_checkpointing"]
    sizes = [replace(largest, train=replace(largest.train, gradient_checkpointing=kind, micro_batch=size))
             for size in (best["largest_micro_batch"], 2 * best["largest_micro_batch"])]  # fmt: skip
    fitting = [small.estimate(each).fits for each in sizes if each.train.micro_batch <= 64]
    assert fitting == [True, False][: len(fitting)]
    assert f"{best['keys']} ({best['micro_batch']} x {best['accumulation']} a step): " in told_of
    assert f"; the largest micro-batch that fits so: {best['largest_micro_batch']}\n" in told_of


@pytest.mark.parametrize(("gpu", "rate"), [("h200", 400.0), ("a100", 200.0), ("l40s", 12.5), ("4090", 12.5)])
def test_the_network_is_the_gpus_unless_it_is_given(planner: Planner, gpu: str, rate: float) -> None:
    several, config = replace(planner.cluster, gpu=GPUS[gpu], gpus=16), with_step(planner.config, 0, 32)
    assert several.network == rate * 1e9
    assert replace(several, network_gb_s=3.0).network == 3e9
    sent = planner.estimate(config, cluster=several).step.communication
    slower = planner.estimate(config, cluster=replace(several, network_gb_s=rate / 10)).step.communication
    assert slower / sent == pytest.approx(10 * min(1.0, GPUS[gpu].link_gb_s / rate))


def test_what_is_as_fast_as_any_is_left_as_it_is(planner: Planner) -> None:
    able = [planner.estimate(each) for each in choices(with_step(planner.config, AUTO, AUTO), planner.cluster.world())]
    enough = 0.98 * max(each.images_per_second for each in able)
    alike = [each for each in able if each.images_per_second >= enough]
    assert 1 < len(alike) < len(able)
    for each in able:
        assert (planner.fastest(each) is each) == (each in alike)
    assert planner.fastest(replace(alike[0], fits=False)) is not alike[0]


def test_other_numbers_of_gpus() -> None:
    """Of 768 images: each number that divides them, by the fastest micro-batch that divides its share."""
    planner = planner_of("mae", "Ti", 64, gpus=12)
    points = {each["gpus"]: each for each in plan(planner)["scaling"]}
    assert list(points) == [1, 2, 4, 8, 12, 16, 32, 64, 128]
    for gpus, point in points.items():
        there = Planner(with_step(planner.config, 0, AUTO), replace(planner.cluster, gpus=gpus))
        speeds = [each.images_per_second for each in map(there.estimate, choices(there.config, there.cluster.world()))]
        assert point["images_per_second"] == max(speeds)
        assert point["micro_batch"] * point["accumulation"] * gpus == 768


def test_numbers_of_gpus_that_cannot_be() -> None:
    planner = planner_of("classification", "Ti", 16, gpus=8)
    mixed = replace(planner.config, augment=replace(planner.config.augment, mixup=0.8))
    points = scaling(Planner(mixed, planner.cluster), mixed)
    last = points[-1]
    assert (last["gpus"], last["images_per_second"]) == (128, None)
    assert "mixes neighbours, and train.micro_batch=1 is odd" in last["refused"]
    small = Planner(planner.config, replace(planner.cluster, gpu=replace(GPUS["h200"], memory_gb=0.5)))
    none = scaling(small, small.config)
    assert all(each["images_per_second"] is each["refused"] is None for each in none)
    assert ", 128: refused\n  refused: augment.mixup=0.8: mixes" in told(points)
    assert " 1: does not fit, 2: does not fit" in told(none)


def test_more_of_a_share_needs_less_of_a_gpu(planner: Planner) -> None:
    def total(stage: int) -> int:
        parallel = replace(planner.config.parallel, zero_stage=stage)
        return planner.estimate(replace(planner.config, parallel=parallel)).memory.total_bytes

    assert total(0) > total(1) >= total(2)


def test_epochs_need_the_number_of_images(planner: Planner) -> None:
    config: RunConfig = replace(planner.config, train=replace(planner.config.train, steps=None, epochs=2.0))
    by_epochs = Planner(config, planner.cluster)
    unknown = plan(by_epochs)["run"]
    assert unknown["steps"] is None
    assert "--images N" in unknown["missing"]
    assert plan(by_epochs, images=512 * 7 + 300)["run"]["steps"] == 14


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(RECIPE), "model.preset=Ti", "--gpu", "H100", "--gpus", "16", "--images", "1281167"]
    words += ["--price", "2.5", "data.train=nowhere/*.tar"]
    assert main([*words, "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["total_bytes"] > 0
    assert found["images_per_second"] > 0
    assert found["run"]["cost"] == pytest.approx(2.5 * found["run"]["gpu_hours"])
    assert main([*words, "--explain"]) == DONE
    text = capsys.readouterr().out
    assert "16 x H100 SXM, 2 node(s) with 400 GB/s each" in text
    assert f"The GPU: {GPUS['h100'].source}; " in text
    assert "450 GB/s from a GPU to the others of its node;\nbetween nodes 400 GB/s" in text
    assert found["fastest"]["is_this"] == ("this is as fast as any that fits" in text)
    assert main([*words, "train.global_batch=65536", "train.micro_batch=4096"]) == BAD_INPUT
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_what_auto_would_be(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(RECIPE), "model.preset=Ti", "--gpu", "h100", "--gpus", "16", "parallel.zero_stage=auto"]
    assert main([*words, "train.micro_batch=64"]) == DONE
    assert "parallel.zero_stage would be: ZeRO 0, micro-batch 64 x 4: " in capsys.readouterr().out
    assert main([*words, "train.micro_batch=auto", "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert found["auto"] == ["parallel.zero_stage", "train.micro_batch"]
    assert found["fits"]
    assert found["micro_batch"] * found["accumulation"] * 16 == 4096


@pytest.mark.parametrize(("option", "value", "says"), [
    ("--price", "abc", "'abc': must be a number from 0.001 to 1,000,000"),
    ("--price", "nan", "'nan': must be a number from"),
    ("--network", "1e-300", "'1e-300': must be a number from"),
    ("--images", "9" * 30, f"{'9' * 30}: must be 1,000,000,000,000 or less"),
])  # fmt: skip
def test_options_are_bounded(option: str, value: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(RECIPE), "--gpu", "h100", "--gpus", "16", option, value])
    assert ended.value.code == BAD_INPUT
    assert f"argument {option}: {says}" in capsys.readouterr().err


def test_little_is_told_as_little_and_what_is_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(RECIPE), "model.preset=Ti", "train.cuda_graphs=true", "--gpu", "A100-40GB", "--gpus", "16"]
    assert main([*words, "--image-kb", "0.002"]) == DONE
    text = capsys.readouterr().out
    assert "16 x A100 SXM 40GB, 2 node(s)" in text
    assert "loader: below 1 core and below 1 MB/s a node" in text
    assert "not counted: what train.cuda_graphs keeps" in text
    assert "not measured: a run with train.cuda_graphs on a GPU" in text


class At(NamedTuple):
    """What `preferred` looks at of an estimate."""

    config: Any
    images_per_second: float


@given(st.dictionaries(st.tuples(st.integers(0, 3), st.integers(1, 64)), st.floats(1.0, 1e4)), st.booleans())
def test_of_what_fits_the_lowest_stage_and_then_what_is_fast(
    rates: dict[tuple[int, int], float], by_speed: bool
) -> None:
    fitting: Any = [At(with_step(RunConfig(), stage, micro), rate) for (stage, micro), rate in rates.items()]
    best: Any = preferred(fitting, by_speed)
    if not fitting:
        assert best is None
        return
    stage, micro = best.config.parallel.zero_stage, best.config.train.micro_batch
    alike = {size: rate for (each, size), rate in rates.items() if each == stage}
    assert rates[stage, micro] >= 0.98 * max(alike.values())
    assert all(rate < 0.98 * max(alike.values()) for size, rate in alike.items() if size < micro)
    below = [rate for (each, _), rate in rates.items() if each < stage]
    assert all(by_speed and rate < 0.9 * max(rates.values()) for rate in below)


def test_more_room_is_no_worse(planner: Planner) -> None:
    free = with_step(planner.config, AUTO, AUTO)
    speed = 0.0
    for gigabytes in (0.5, 1.6, 2.0, 3.0, 6.0, 20.0):
        gpu = replace(GPUS["h200"], memory_gb=gigabytes)
        choice = Planner(free, replace(planner.cluster, gpu=gpu)).choice()
        if gigabytes == 0.5:
            assert choice is None
            continue
        assert choice is not None
        assert choice.fits
        assert choice.images_per_second >= 0.9 * speed
        speed = choice.images_per_second
    assert choice.config.parallel.zero_stage == 0


def test_the_stage_is_the_lowest_that_fits(planner: Planner) -> None:
    free = with_step(planner.config, AUTO, 64)
    needed = [planner.estimate(with_step(free, stage, 64)).memory.total_bytes for stage in range(4)]
    for memory in (needed[0], needed[0] - 1, min(needed), min(needed) - 1):
        gpu = replace(GPUS["h200"], memory_gb=memory / 1e9)
        choice = Planner(free, replace(planner.cluster, gpu=gpu)).choice()
        expected = next((stage for stage in range(4) if needed[stage] <= gpu.memory), None)
        assert (choice and choice.config.parallel.zero_stage) == expected


def test_a_trial_that_took_more_makes_it_choose_less(planner: Planner) -> None:
    cluster = replace(planner.cluster, gpu=replace(GPUS["h200"], memory_gb=3.0))
    open_one = Planner(with_step(planner.config, 0, AUTO), cluster)
    first, worse = open_one.choice(), open_one.choice(ratio=3.0)
    assert first is not None
    assert worse is not None
    assert worse.config.train.micro_batch < first.config.train.micro_batch
    least = open_one.choice(most=1)
    assert least is not None
    assert least.config.train.micro_batch == 1
    assert open_one.choice(most=0) is None


@pytest.mark.parametrize(
    ("name", "says"), [("h20", "must be one of a100, a100-40gb, h100"), ("rtx4090", ""), ("A100", "")]
)
def test_gpus_by_name(name: str, says: str) -> None:
    if not says:
        assert gpu_of(name) in GPUS.values()
        return
    with pytest.raises(ConfigError, match=says):
        gpu_of(name)
