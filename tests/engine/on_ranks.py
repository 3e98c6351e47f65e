"""What tests have ranks do: an engine over a tiny classifier, without shards, reader or run folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from vitscale.config.schema import Model, Objective, Optimizer, Parallel, RunConfig, Train
from vitscale.engine import backend
from vitscale.engine.engine import Engine, Inputs
from vitscale.models.auto import build_model, initialize
from vitscale.world import World, read_world

BATCH, MICRO, LR = 8, 2, 2e-3


def run_config(stage: int, **train: Any) -> RunConfig:
    return RunConfig(
        model=Model(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
                    patch_size=4, num_labels=3, drop_path_rate=0.1),
        objective=Objective(name="classification"),
        optimizer=Optimizer(clip=1.0),
        train=Train(global_batch=BATCH, micro_batch=MICRO, **train),
        parallel=Parallel(zero_stage=stage, timeout_s=60),
    )  # fmt: skip


def start_model(config: RunConfig) -> nn.Module:
    with torch.device("meta"):
        model = build_model(config)
    initialize(model, seed=0)
    return model


def images(step: int, first: int, last: int) -> Inputs:
    """Samples [first, last) of a step's global batch, whatever the ranks."""
    chance = torch.Generator().manual_seed(step)
    pixels = torch.randn(BATCH, 3, 16, 16, generator=chance)
    labels = torch.randint(3, (BATCH,), generator=chance)
    keys = torch.arange(BATCH) + 1000 * step
    return {"pixel_values": pixels[first:last], "labels": labels[first:last], "sample_key": keys[first:last]}


def micro_batches(step: int, world: World) -> Iterator[Inputs]:
    """This rank's part of a step's global batch."""
    share = BATCH // world.world_size
    for first in range(world.rank * share, (world.rank + 1) * share, MICRO):
        yield images(step, first, first + MICRO)


class Rank:
    """One rank of a process group; it may make several engines of one stage."""

    def __init__(self, stage: int, **train: Any) -> None:
        self.world = read_world()
        self.config = run_config(stage, **train)
        exact = backend.zero_config

        def small_threshold(config: RunConfig, world: World) -> dict[str, Any]:
            """So that ZeRO-3 shards this model's matrices and leaves biases and norms whole, as it does large ones'."""
            content = exact(config, world)
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
            return content

        backend.zero_config = small_threshold
        self.backend = backend.Backend(self.config, self.world)

    def engine(self, model: nn.Module | None = None, **options: Any) -> Engine:
        made = self.backend.wrap(model or start_model(self.config), self.config, **options)
        made.warm_up(images(0, 0, MICRO))
        return made

    def losses(self, engine: Engine, first: int, last: int) -> list[float]:
        """Take the steps first to last - 1; each's loss over all ranks."""
        taken = []
        for step in range(first, last):
            loss = engine.step(micro_batches(step, self.world), LR).loss
            taken.append(float(self.backend.ranks.sum(np.array([loss]))[0]) / self.world.world_size)
        return taken


def snapshot(stage: int) -> None:
    """A snapshot is what it was after later steps have changed all that it was taken of."""
    rank = Rank(stage)
    engine = rank.engine()
    rank.losses(engine, 0, 2)
    taken = engine.snapshot()
    exact = [piece.values.copy() for piece in taken]
    rank.losses(engine, 2, 4)
    for piece, values in zip(taken, exact, strict=True):
        np.testing.assert_array_equal(piece.values, values, err_msg=piece.name)
    for before, after in zip(taken, engine.snapshot(), strict=True):
        assert (before.kind, before.name, before.start) == (after.kind, after.name, after.start)
        assert not np.array_equal(before.values, after.values), (before.kind, before.name)
