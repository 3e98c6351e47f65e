"""The engine on real ranks, at every stage: what it saves, freezes, scales, averages and evaluates."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine import on_ranks
from tests.engine.on_ranks import (
    FROZEN,
    STEPS,
    STOP,
    TOKENS,
    by_plain_torch,
    held_out,
    layer_scales,
    run_config,
    scores,
    start_model,
)
from tests.integration.worlds import Launcher
from vitscale.checkpoint.store import Checkpoint, SoleRank, folder_name, open_checkpoint

full = pytest.mark.full
FP32 = [
    pytest.param(stage, ranks, "fp32", marks=[full] if ranks == 4 else [])
    for ranks, stage in itertools.product((1, 2, 4), (0, 1, 2, 3))
]
BF16 = [pytest.param(2, 2, "bf16"), *(pytest.param(stage, 2, "bf16", marks=full) for stage in (0, 3))]
in_fp32 = pytest.mark.parametrize(("stage", "ranks", "precision"), FP32)
everywhere = pytest.mark.parametrize(("stage", "ranks", "precision"), FP32 + BF16)


@dataclass
class Results:
    """What the ranks of one world returned from the cases of on_ranks.py, and their checkpoints."""

    folder: Path
    by_rank: list[dict[str, Any]]

    def __getitem__(self, case: str) -> dict[str, Any]:
        return self.by_rank[0][case]

    def saved(self, case: str, step: int = STEPS) -> Checkpoint:
        return open_checkpoint(self.folder / case / folder_name(step), SoleRank())


World = Callable[[int, int, str], Results]


@pytest.fixture(scope="module")
def world(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The results of a world, which runs all cases once for all tests."""
    results: dict[tuple[int, int, str], Results] = {}

    def get(stage: int, ranks: int, precision: str) -> Results:
        key = (stage, ranks, precision)
        if key not in results:
            folder = tmp_path_factory.mktemp("engine")
            by_rank = launcher.call(on_ranks.all_cases, ranks, stage=stage, folder=str(folder), precision=precision)
            results[key] = Results(folder, by_rank)
        return results[key]

    return get


class Reference:
    """Results of one process without an engine."""

    @cached_property
    def plain(self) -> Any:
        return by_plain_torch(run_config())

    @cached_property
    def scaled(self) -> Any:
        return by_plain_torch(run_config(), layer_scales(start_model(run_config())), undecayed=TOKENS)

    @cached_property
    def frozen(self) -> Any:
        return by_plain_torch(run_config(), frozen=FROZEN)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def assert_near(checkpoint: Checkpoint, kind: str, expected: dict[str, np.ndarray]) -> None:
    assert checkpoint.shapes(kind).keys() == expected.keys()
    for name, values in expected.items():
        # Where a gradient is nearly 0 Adam makes a step of its rounding.
        np.testing.assert_allclose(checkpoint.whole(kind, name), values, rtol=1e-4, atol=2e-5, err_msg=name)


def written_by_rank(checkpoint: Checkpoint, kind: str, ranks: int) -> list[int]:
    """Elements of a kind that each rank wrote."""
    manifest = json.loads((checkpoint.folder / "manifest.json").read_text())
    rows = [row for tensor in manifest["tensors"] if tensor["kind"] == kind for row in tensor["pieces"]]
    return [sum(count for file, count, files in rows if file <= rank < file + files) for rank in range(ranks)]


# ---- saving


@everywhere
def test_no_later_step_changes_a_snapshot(world: World, stage: int, ranks: int, precision: str) -> None:
    for case in (by_rank["plain"] for by_rank in world(stage, ranks, precision).by_rank):
        assert case["unchanged"]
        assert case["moved"], "the steps after it changed nothing: there was nothing to see"


@in_fp32
def test_ranks_write_even_parts(world: World, stage: int, ranks: int, precision: str) -> None:
    """Of DDP's weights, which all ranks have, to an element; ZeRO's partitions may end in padding."""
    counts = written_by_rank(world(stage, ranks, precision).saved("plain"), "param", ranks)
    assert sum(counts) == sum(p.numel() for p in start_model(run_config()).parameters())
    assert max(counts) - min(counts) <= (1 if stage == 0 else sum(counts) // 10)


# ---- frozen parameters


@everywhere
def test_frozen_parameters_stay_and_are_saved_exactly(world: World, stage: int, ranks: int, precision: str) -> None:
    """Of kind `frozen` alone, in fp32 as they were at the start, every rank writing its part."""
    checkpoint = world(stage, ranks, precision).saved("frozen")
    at_start = {name: p for name, p in start_model(run_config()).named_parameters() if name.startswith(FROZEN)}
    assert checkpoint.shapes("frozen").keys() == at_start.keys()
    assert {name for kind, name in checkpoint.tensors if kind != "frozen"}.isdisjoint(at_start)
    for name, values in at_start.items():
        np.testing.assert_array_equal(checkpoint.whole("frozen", name), values.detach().numpy(), err_msg=name)
    counts = written_by_rank(checkpoint, "frozen", ranks)
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == sum(p.numel() for p in at_start.values())


# ---- steps: all trained, with learning rates by layer, with frozen parameters


@in_fp32
@pytest.mark.parametrize("case", ["plain", "scaled", "frozen"])
def test_equals_plain_torch(
    world: World, reference: Reference, stage: int, ranks: int, precision: str, case: str
) -> None:
    """As a parameter group for each gives it. With the scales, tokens are exempt from weight decay."""
    losses, weights, average = getattr(reference, case)
    results = world(stage, ranks, precision)
    assert results[case]["losses"] == pytest.approx(losses, rel=1e-5)
    assert_near(results.saved(case), "param", weights)
    assert_near(results.saved(case), "ema", average)
    assert case != "scaled" or losses != pytest.approx(reference.plain[0], rel=1e-3)


@everywhere
@pytest.mark.parametrize("case", ["scaled", "frozen"])
def test_stop_and_resume_is_bit_identical(world: World, stage: int, ranks: int, precision: str, case: str) -> None:
    """Losses, and in the end weights, moments, averages and frozen values."""
    for result in (by_rank[case] for by_rank in world(stage, ranks, precision).by_rank):
        assert result["resumed"] == result["losses"][STOP:]
        assert result["same"]


# ---- what the host waits for

GUARD = ("vitscale/engine/ddp.py", "_update"), ("deepspeed/runtime/utils.py", "is_invalid_grad_norm")
AFTER_IT = {
    ("vitscale/engine/engine.py", "read"): 2,  # of the loss and metrics, which lie before the norm on the device
    ("vitscale/engine/loop.py", "_row"): 1,  # of the norm itself, for a row
}
ON_THE_CPU = {
    ("vitscale/engine/ranks.py", "sum"), ("vitscale/engine/ranks.py", "finish"),  # what ranks tell each other
    ("torch/optim/optimizer.py", "_get_value"),  # Adam's counts of steps, where AdamW is not fused
}  # fmt: skip


@everywhere
def test_a_step_waits_for_the_guard_alone(world: World, stage: int, ranks: int, precision: str) -> None:
    """In two steps, of which one has a row, the host asks the device twice: whether the gradient is finite. Above stage
    0 it is DeepSpeed's step that asks."""
    for by_rank in world(stage, ranks, precision).by_rank:
        found = {
            (file, function): count
            for file, function, what, count in by_rank["waits"]["found"]
            if (file, function) not in ON_THE_CPU
            and not (what == "to" and file.startswith("deepspeed/"))  # its accelerator, which here is the CPU
        }
        assert found == {GUARD[stage > 0]: 2, **AFTER_IT}


# ---- the moving average


@everywhere
def test_a_step_that_is_not_applied_leaves_the_average(world: World, stage: int, ranks: int, precision: str) -> None:
    assert all(by_rank["skipped"]["same"] for by_rank in world(stage, ranks, precision).by_rank)


# ---- evaluation


@everywhere
def test_training_goes_on_as_if_never_evaluated(world: World, stage: int, ranks: int, precision: str) -> None:
    results = world(stage, ranks, precision)
    assert results["evaluated"]["losses"] == results["plain"]["losses"]
    one, other = results.saved("evaluated"), results.saved("plain")
    assert one.tensors == other.tensors
    for key in one.tensors:
        np.testing.assert_array_equal(one.whole(*key), other.whole(*key), err_msg=str(key))


@everywhere
def test_evaluation_sums_over_ranks_by_the_average(world: World, stage: int, ranks: int, precision: str) -> None:
    """Ranks have 1, 2, ... batches and as many forwards (asserted by them): each batch counts once."""
    results = world(stage, ranks, precision)
    for when, saved in ((1, results.saved("evaluated", STOP)), (2, results.saved("evaluated"))):
        model = start_model(run_config()).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(saved.whole("ema", name)))
            expected = dict.fromkeys(("correct", "loss", "seen"), 0.0)
            for batch in itertools.chain(*map(held_out, range(ranks))):
                for name, value in scores(model(**batch.inputs), batch).items():
                    expected[name] += float(value)
        for by_rank in results.by_rank:
            sums = by_rank["evaluated"]["sums"][when]
            assert sums["seen"] == expected["seen"] == ranks * (ranks + 1)
            assert sums["loss"] == pytest.approx(expected["loss"], rel=1e-5 if precision == "fp32" else 0.02)
            assert precision == "bf16" or sums["correct"] == expected["correct"]
            assert sums == results["evaluated"]["sums"][when]
