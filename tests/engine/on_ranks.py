"""Cases that ranks run: engines of a tiny classifier, without shards, reader or run folder."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.engine.host_syncs import HostSyncs
from vitscale.checkpoint.saving import save_checkpoint
from vitscale.checkpoint.store import open_checkpoint
from vitscale.config.schema import Model, Objective, Optimizer, Parallel, RunConfig, Train
from vitscale.engine import backend
from vitscale.engine.engine import Engine, Inputs, load_weights
from vitscale.engine.loop import PeriodicTask, TrainingLoop, TrainState
from vitscale.files.header import CAUSES
from vitscale.models.auto import new_model
from vitscale.tracking.meters import Meters
from vitscale.world import World, read_world

BATCH, LR, EMA_DECAY = 8, 2e-3, 0.5
STEPS, STOP = 4, 2
FROZEN = ("vit.embeddings.", "vit.encoder.layers.1.mlp.fc1.")  # the start, and a part with trained ones on both sides
TOKENS = ("vit.embeddings.cls_token", "vit.embeddings.position_embeddings")


def run_config(stage: int = 0, ranks: int = 1, **train: Any) -> RunConfig:
    """Two micro-batches a step on one rank, one on more."""
    return RunConfig(
        model=Model(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
                    patch_size=4, num_labels=3, drop_path_rate=0.1),
        objective=Objective(name="classification"),
        optimizer=Optimizer(clip=1.0),
        train=Train(global_batch=BATCH, micro_batch=min(4, BATCH // ranks), ema_decay=EMA_DECAY, **train),
        parallel=Parallel(zero_stage=stage, timeout_s=60),
    )  # fmt: skip


def start_model(config: RunConfig, frozen: Sequence[str] = ()) -> nn.Module:
    """frozen: how the names of parameters that are not trained begin."""
    model = new_model(config, seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    return model


def layer_scales(model: nn.Module) -> dict[str, float]:
    """Layer-wise decay: the nearer to the pixels, the less a parameter learns; 1 where none is named."""
    by_start = {"vit.embeddings.": 0.1, "vit.encoder.layers.0.": 0.3, "vit.encoder.layers.1.": 0.6}
    names = [name for name, _ in model.named_parameters()]
    return {name: scale for name in names for start, scale in by_start.items() if name.startswith(start)}


def images(step: int, first: int, last: int) -> Inputs:
    """Samples [first, last) of a step's global batch, whatever the ranks."""
    chance = torch.Generator().manual_seed(step)
    pixels = torch.randn(BATCH, 3, 16, 16, generator=chance)
    labels = torch.randint(3, (BATCH,), generator=chance)
    keys = torch.arange(BATCH) + 1000 * step
    return {"pixel_values": pixels[first:last], "labels": labels[first:last], "sample_key": keys[first:last]}


def held_out(rank: int) -> list[SimpleNamespace]:
    """What a rank evaluates on: the higher the rank, the more batches."""
    return [SimpleNamespace(inputs=images(100 + 10 * rank + number, 0, 2)) for number in range(rank + 1)]


def scores(output: Any, batch: SimpleNamespace) -> dict[str, torch.Tensor]:
    labels = batch.inputs["labels"]
    correct = (output.logits.argmax(dim=-1) == labels).sum()
    return {"loss": output.loss * len(labels), "correct": correct, "seen": torch.tensor(len(labels))}


class Rank:
    """One rank of a process group; it makes several engines of one stage, one after another."""

    def __init__(self, stage: int, **train: Any) -> None:
        self.world = read_world()
        self.config = run_config(stage, self.world.world_size, **train)
        self.micro = self.config.train.micro_batch
        exact = backend.zero_config

        def small_threshold(config: RunConfig, world: World, parameters: int) -> dict[str, Any]:
            """So that ZeRO-3 shards this model's matrices, and keeps biases and norms whole."""
            content = exact(config, world, parameters)
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
            return content

        backend.zero_config = small_threshold
        self.backend = backend.Backend(self.config, self.world)
        self.ranks = self.backend.ranks

    def engine(self, saved: Path | None = None, frozen: Sequence[str] = (), **options: Any) -> Engine:
        """A fresh engine, or one that goes on from a checkpoint."""
        model = start_model(self.config, frozen)
        checkpoint = open_checkpoint(saved, self.ranks) if saved else None
        if checkpoint is not None:
            load_weights(model, checkpoint)
        engine = self.backend.wrap(model, self.config, **options)
        if checkpoint is not None:
            engine.restore(checkpoint)
        engine.warm_up(images(0, 0, self.micro))
        return engine

    def losses(self, engine: Engine, first: int, last: int, nan_at: int | None = None) -> list[float]:
        """Take steps [first, last); the loss of each over all ranks. `nan_at`: a step whose pixels are NaN."""
        losses = []
        for step in range(first, last):
            loss = engine.step(self._micro_batches(step, step == nan_at), LR).loss
            losses.append(self.ranks.sum({"loss": loss})["loss"] / self.world.world_size)
        return losses

    def _micro_batches(self, step: int, nan: bool) -> Iterator[Inputs]:
        share = BATCH // self.world.world_size
        for first in range(self.world.rank * share, (self.world.rank + 1) * share, self.micro):
            inputs = dict(images(step, first, first + self.micro))
            if nan:
                inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
            yield inputs

    def save(self, engine: Engine, folder: Path, step: int) -> Path:
        state = {"adam_step": engine.adam_step}
        return save_checkpoint(folder, step, engine.snapshot(), state, self.ranks, keep=10)

    def resumed(self, folder: Path, **options: Any) -> dict[str, Any]:
        """A run with checkpoints in its middle and at its end, and one resumed from the middle."""
        engine = self.engine(**options)
        losses = self.losses(engine, 0, STOP)
        saved = self.save(engine, folder, STOP)
        losses += self.losses(engine, STOP, STEPS)
        self.save(engine, folder, STEPS)
        again = self.engine(saved, **options)
        resumed = self.losses(again, STOP, STEPS)
        return {"losses": losses, "resumed": resumed, "same": _same(engine.snapshot(), again.snapshot())}


def all_cases(stage: int, folder: str, **train: Any) -> dict[str, Any]:
    """One rank's results of the cases below, by name; the checkpoints of each are in a folder of that name."""
    rank = Rank(stage, **train)
    scales = layer_scales(start_model(rank.config))
    cases: dict[str, Callable[[Rank, Path], dict[str, Any]]] = {
        "plain": plain,
        "evaluated": evaluated,
        "skipped": skipped,
        "waits": waits,
        "scaled": functools.partial(Rank.resumed, lr_scales=scales, undecayed=TOKENS),
        "frozen": functools.partial(Rank.resumed, frozen=FROZEN),
    }
    return {name: case(rank, Path(folder) / name) for name, case in cases.items()}


def plain(rank: Rank, folder: Path) -> dict[str, Any]:
    """Never evaluated. A snapshot of its middle is compared with itself at the end."""
    engine = rank.engine()
    losses = rank.losses(engine, 0, STOP)
    snapshot = engine.snapshot()
    copies = [piece.values.copy() for piece in snapshot]
    losses += rank.losses(engine, STOP, STEPS)
    rank.save(engine, folder, STEPS)
    unchanged = all(np.array_equal(piece.values, values) for piece, values in zip(snapshot, copies, strict=True))
    moved = [not np.array_equal(a.values, b.values) for a, b in zip(snapshot, engine.snapshot(), strict=True)]
    return {"losses": losses, "unchanged": unchanged, "moved": all(moved)}


def evaluated(rank: Rank, folder: Path) -> dict[str, Any]:
    """Evaluated before the first step, in the middle, where it also is saved, and at the end."""
    engine = rank.engine()
    forwards: list[tuple[bool, bool]] = []  # (in training mode, with gradients)
    engine.module.register_forward_hook(lambda module, *_: forwards.append((module.training, torch.is_grad_enabled())))
    count = rank.world.world_size + 1  # even the rank with the most batches has one forward to repeat

    def evaluate() -> dict[str, float]:
        before = len(forwards)
        result = engine.evaluate(held_out(rank.world.rank), count, scores)
        assert forwards[before:] == [(False, False)] * count
        return result

    sums = [evaluate()]
    losses = rank.losses(engine, 0, STOP)
    sums.append(evaluate())
    rank.save(engine, folder, STOP)
    losses += rank.losses(engine, STOP, STEPS)
    rank.save(engine, folder, STEPS)
    sums.append(evaluate())
    return {"losses": losses, "sums": sums}


def skipped(rank: Rank, folder: Path) -> dict[str, Any]:
    """A step that is not applied between two checkpoints."""
    engine = rank.engine()
    rank.losses(engine, 0, 1)
    before = engine.snapshot()
    rank.losses(engine, 1, 2, nan_at=1)
    return {"same": _same(before, engine.snapshot())}


def waits(rank: Rank, folder: Path) -> dict[str, Any]:
    """What the host reads of tensors in the third and fourth step of a loop, of which the last has a row.

    In the first two ZeRO-3 compares with all ranks in which order it fetches weights.
    """
    spy, engine = HostSyncs(), rank.engine()

    def watch(state: TrainState, row: dict[str, Any]) -> None:
        if state.step == 2:
            spy.__enter__()
        elif state.step == 4:
            spy.__exit__(None, None, None)

    loop = TrainingLoop(
        engine=engine, feed=_Feed(rank), state=TrainState(), total_steps=5, config=rank.config,
        tasks=[PeriodicTask("watch", lambda step: step in (2, 4), watch)], record=lambda *_: None, say=lambda _: None,
        causes=CAUSES, stop=_NoStop(), meters=Meters(),  # type: ignore[arg-type]
    )  # fmt: skip
    assert loop.run()
    return {"found": [[*what, count] for what, count in sorted(spy.found.items())]}


class _Feed:
    """The micro-batches of steps 0, 1, ... on this rank."""

    def __init__(self, rank: Rank) -> None:
        steps = itertools.count()
        self._inputs = itertools.chain.from_iterable(rank._micro_batches(step, nan=False) for step in steps)

    def __next__(self) -> SimpleNamespace:
        return SimpleNamespace(inputs=next(self._inputs), names=[], replaced=[], retries=0, epoch=0)

    def run_ahead(self) -> None:
        pass

    def read_seconds(self) -> dict[str, float]:
        return {}


class _NoStop:
    def requested(self) -> bool:
        return False

    def save_requested(self) -> bool:
        return False


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two snapshots are equal, bit by bit."""
    first, second = ({(p.kind, p.name, p.start): p.values for p in pieces} for pieces in (one, other))
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def by_plain_torch(
    config: RunConfig,
    scales: Mapping[str, float] | None = None,
    frozen: Sequence[str] = (),
    undecayed: Sequence[str] = (),
) -> tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Losses, and weights and their average after the steps, by torch's AdamW with a group for each parameter."""
    model = start_model(config, frozen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p], "lr": LR * (scales or {}).get(name, 1.0),
         "weight_decay": config.optimizer.weight_decay if p.ndim > 1 and name not in undecayed else 0.0}
        for name, p in trained.items()
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=config.optimizer.eps)
    average = {name: p.detach().clone() for name, p in trained.items()}
    losses = []
    model.train()
    for step in range(STEPS):
        loss = model(**images(step, 0, BATCH)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        for name, p in trained.items():
            average[name] = EMA_DECAY * average[name] + (1 - EMA_DECAY) * p.detach()
    arrays = {name: p.detach().numpy() for name, p in trained.items()}
    return losses, arrays, {name: value.numpy() for name, value in average.items()}
