"""A checkpoint of a real engine (ZeRO-2, one rank, fp32) beside DeepSpeed's own and torch.distributed.checkpoint's.

Each save makes new files, as in a run: to write over those that are there costs a disk less.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitscale import world
from vitscale.bench.gpu_suite.training import LR, Training, batch
from vitscale.bench.measuring import seconds
from vitscale.bench.peers import run_config
from vitscale.bench.rounds import figures, in_turns
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.saving import Saver
from vitscale.checkpoint.store import SoleRank, open_checkpoint
from vitscale.config.schema import Parallel, Train
from vitscale.engine.engine import load_weights

SAVE, LOAD = "vitscale: save", "vitscale: load, verified"
DEEPSPEED, DEEPSPEED_LOAD = "DeepSpeed: save_checkpoint, and fsync", "DeepSpeed: load_checkpoint"
DCP, DCP_LOAD = "torch.distributed.checkpoint: save", "torch.distributed.checkpoint: load"


def measure(preset: str, rounds: int, folder: Path, disk: Callable[[int], None]) -> dict[str, Any]:
    """Figures by contender, with the `bytes` of each, beside `disk`, which writes so many bytes. In a process of its
    own: an engine leaves memory behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measured, preset, rounds, folder, disk).result()


def _measured(preset: str, rounds: int, folder: Path, disk: Callable[[int], None]) -> dict[str, Any]:
    train = Train(global_batch=1, micro_batch=1, precision="fp32")
    config = replace(run_config(preset, "mae"), parallel=Parallel(zero_stage=2), train=train)
    with Training(config, world.enter()) as training, Saver(folder / "ours", SoleRank(), Retention(1)) as saver:
        engine = training.engine
        engine.step([batch(config, 0, training.backend.device)], LR)
        dcp_save, dcp_load = _by_dcp(training, folder / "dcp")
        works: dict[str, Callable[[], float]] = {
            SAVE: partial(seconds, partial(_save, training, saver)),
            LOAD: partial(seconds, partial(_load, training, folder / "ours" / "step_00000001")),
            DEEPSPEED: partial(_anew, folder / "deepspeed", partial(_save_by_deepspeed, engine.model)),
            DEEPSPEED_LOAD: partial(seconds, partial(_load_by_deepspeed, engine.model, folder / "deepspeed")),
            DCP: partial(_anew, folder / "dcp", dcp_save),
            DCP_LOAD: partial(seconds, dcp_load),
        }
        for work in works.values():  # makes what is read, and the memory
            work()
        sizes = {name: _bytes(folder / path) for name, path in _PATHS.items()}
        works["dd with fsync"] = partial(seconds, partial(disk, sizes[SAVE]))
        times = in_turns(works, rounds)
    result = figures(times, "dd with fsync")
    for name, figure in result.items():
        figure["bytes"] = sizes.get(name, sizes[SAVE])
        figure["rate"] = figure["bytes"] / 1e6 / figure["median_ms"]
    return result


_PATHS = {SAVE: "ours", LOAD: "ours", DEEPSPEED: "deepspeed", DEEPSPEED_LOAD: "deepspeed", DCP: "dcp", DCP_LOAD: "dcp"}


def _anew(folder: Path, save: Callable[[Path], object]) -> float:
    """Seconds of a save into this folder, from which the one before has gone."""
    shutil.rmtree(folder, ignore_errors=True)
    return seconds(partial(save, folder))


def _save(training: Training, saver: Saver) -> None:
    saver.begin(1, training.engine.snapshot, {"adam_step": training.engine.adam_step}, required=True)
    saver.wait()
    if saver.error is not None:
        raise saver.error


def _load(training: Training, folder: Path) -> None:
    checkpoint = open_checkpoint(folder, SoleRank())
    load_weights(training.engine.module, checkpoint)
    training.engine.restore(checkpoint)


def _save_by_deepspeed(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(str(folder), tag="1")
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())


def _load_by_deepspeed(engine: Any, folder: Path) -> None:
    engine.load_checkpoint(str(folder), tag="1")


def _by_dcp(training: Training, folder: Path) -> tuple[Callable[[Path], object], Callable[[], object]]:
    """Saves and loads the same weights and moments as ours."""
    from torch.distributed import checkpoint

    pieces = training.engine.snapshot()
    state = {f"{piece.kind}.{piece.name}.{piece.start}": torch.from_numpy(piece.values) for piece in pieces}
    return (
        lambda folder: checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(folder, sync_files=True)),
        lambda: checkpoint.load(state, storage_reader=checkpoint.FileSystemReader(folder)),
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
