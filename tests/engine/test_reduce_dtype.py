"""parallel.reduce_dtype: in which type gradients cross ranks, and how near training in bf16 stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.integration.worlds import Launcher
from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import LR, batch
from vitscale.engine.backend import Backend
from vitscale.models.auto import new_model
from vitscale.world import enter

full = pytest.mark.full
REDUCING = ("allreduce_", "_reduce_scatter_base_", "reduce_scatter_", "reduce_")


class Reduced(TorchDispatchMode):
    """The types of what collectives sum, numbers of the loop and norms aside."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in REDUCING:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.numel() > 1]
            self.dtypes |= {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
        return func(*args, **(kwargs or {}))


def of_rank(stage: int, precision: str, reduce_dtype: str, steps: int) -> dict[str, Any]:
    """The losses over all ranks, and what their gradients were reduced in."""
    world, config = enter(on_ranks=True), small_config("multitask")
    train = replace(config.train, precision=precision, micro_batch=8 // world.world_size)
    parallel = replace(config.parallel, zero_stage=stage, reduce_dtype=reduce_dtype, timeout_s=60)
    config = replace(config, train=train, parallel=parallel)
    backend = Backend(config, world)
    engine = backend.wrap(new_model(config, 0), config)
    numbers = [step * world.world_size + world.rank for step in range(steps)]
    torch.autograd.set_multithreading_enabled(False)  # a backward in a thread of its own would not be seen
    with Reduced() as reduced:
        own = [engine.step([batch(config, number, backend.device)], LR).loss for number in numbers]
    losses = [backend.ranks.sum({"loss": loss})["loss"] / world.world_size for loss in own]
    return {"losses": losses, "dtypes": sorted(reduced.dtypes)}


@pytest.mark.parametrize(("ranks", "stage", "precision"), [
    (2, 0, "bf16"), (2, 2, "bf16"), (2, 3, "bf16"),
    *(pytest.param(2, stage, "fp32", marks=full) for stage in range(4)), pytest.param(2, 1, "bf16", marks=full),
    *(pytest.param(4, stage, "bf16", marks=full) for stage in range(4)),
])  # fmt: skip
def test_gradients_cross_ranks_as_asked(launcher: Launcher, ranks: int, stage: int, precision: str) -> None:
    of_types = {
        dtype: launcher.call(of_rank, ranks, stage=stage, precision=precision, reduce_dtype=dtype, steps=6)[0]
        for dtype in ("fp32", "bf16")
    }
    assert of_types["fp32"]["dtypes"] == ["float32"]
    assert of_types["bf16"]["dtypes"] == ["bfloat16"]
    exact, rounded = (of_type["losses"] for of_type in of_types.values())
    # ZeRO's gradients are bf16 before and after: the mean of two is rounded once, either way.
    assert (rounded == exact) == (stage > 0 and precision == "bf16" and ranks == 2)
    assert rounded == pytest.approx(exact, rel=1e-3)
