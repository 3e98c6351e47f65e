"""Stage j: how long the steps of a MAE ViT-H stand still for a save, and what it does to those beside it."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

from vitscale.bench.gpu_suite.cases import Cases, Figures, Setting
from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import LR, Training, batch
from vitscale.bench.measuring import synchronize
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.saving import Saver
from vitscale.config.presets import preset
from vitscale.config.schema import Model, Objective, Parallel, RunConfig, Train
from vitscale.engine.engine import Inputs
from vitscale.engine.pinning import Pinned
from vitscale.world import World

WARM, ALONE = 3, 10  # steps without a save, before the first
SAVES = 3  # the first one allocates the memory and pins it


def cases(setting: Setting) -> Cases:
    return {"asynchronous": partial(_save, setting)}


def _config(setting: Setting) -> RunConfig:
    if setting.tiny:
        return small_config("mae")
    train = Train(global_batch=64, micro_batch=64, precision="bf16")
    model = Model(**preset("H"), image_size=224)
    return RunConfig(model=model, objective=Objective(name="mae"), train=train, parallel=Parallel(zero_stage=2))


def _save(setting: Setting) -> Figures:
    with Training(_config(setting), World(device=setting.device)) as training:
        inputs = batch(training.config, 0, training.backend.device)
        for _ in range(WARM):
            _step(training, inputs)
        alone = [_step(training, inputs) for _ in range(ALONE)]
        folder = setting.scratch / "saves"
        saves: list[Figures] = []
        pinned = Pinned(training.backend.device)
        with Saver(folder, training.backend.ranks, Retention(1)) as saver:
            for number in range(SAVES):
                saves.append(_one_save(training, inputs, saver, pinned, number))
                setting.note({"saves": saves})
        pinned.close()
        count = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    last, step_ms = saves[-1], 1000 * statistics.median(alone)
    figures: Figures = {"saves": saves, "bytes": count, "step_ms": step_ms}
    figures["text"] = (
        f"{count / 1e9:.2f} GB: the steps stand still for {last['stand_still_s']:.3f} s (the first time "
        f"{saves[0]['stand_still_s']:.2f} s); written after {last['seconds']:.1f} s; a step {step_ms:.1f} ms alone, "
        f"{last['step_ms_beside']:.1f} ms beside a save"
    )
    return figures


def _one_save(training: Training, inputs: Inputs, saver: Saver, pinned: Pinned, step: int) -> Figures:
    """A save of now, with steps until it is written."""
    began = time.perf_counter()
    saver.begin(step, lambda reserve: training.engine.snapshot(partial(pinned.reserve, reserve)), {}, required=True)
    stand_still = time.perf_counter() - began
    beside: list[float] = []
    while saver.busy or not beside:
        beside.append(_step(training, inputs))
    if saver.error is not None:
        raise saver.error
    return {"stand_still_s": stand_still, "seconds": saver.seconds, "steps_beside": len(beside),
            "step_ms_beside": 1000 * statistics.median(beside)}  # fmt: skip


def _step(training: Training, inputs: Inputs) -> float:
    """Its seconds."""
    began = time.perf_counter()
    training.engine.step([inputs], LR)
    synchronize(training.backend.device)
    return time.perf_counter() - began
