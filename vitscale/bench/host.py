"""`vitscale bench host`: what a step of the training loop costs beside the forward and backward of its model.

The loop and the engine of a run, at each ZeRO stage, one rank, a MAE of one block, fp32; the same inputs each step, so
that neither reading nor augmentation is in it. `update` is clipping, the guard's question and AdamW, which grow with
the model; `loop` is all else, which does not. Medians of the steps. On a GPU it is the GPU's host that is measured.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from vitscale import world
from vitscale.bench.gpu_suite.training import Training, batch
from vitscale.bench.measuring import device_name
from vitscale.bench.rounds import benchmark_parser, figures, in_turns, report
from vitscale.config.schema import MAE, Model, Objective, Optimizer, Parallel, RunConfig, Train
from vitscale.engine.engine import Engine, Inputs
from vitscale.engine.loop import TrainingLoop, TrainState
from vitscale.engine.preempt import StopRequest
from vitscale.files.header import CAUSES
from vitscale.inference.command import above_zero
from vitscale.run_folder import RunFolder
from vitscale.tracking.meters import Meters

PARTS = ("model", "update", "loop")
_WARM_UP = 5  # steps


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = benchmark_parser("host", __doc__, rounds=3)
    parser.add_argument("--steps", type=above_zero, default=200, help="of a turn (default: %(default)s)")
    options = parser.parse_args(arguments)
    of_process = world.enter()
    stages = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
    works = {name: partial(_seconds, of_process, stage, options.steps) for name, stage in stages.items()}
    measured = in_turns(works, options.rounds)
    beside = {name: [each["update"] + each["loop"] for each in own] for name, own in measured.items()}
    contenders = figures(beside, "DDP")
    for name, own in measured.items():
        contenders[name] |= {f"{part}_ms": 1000 * statistics.median(each[part] for each in own) for part in PARTS}
    device = device_name(torch.device(of_process.device))
    result = {"bench": "host", **vars(options), "device": device, "contenders": contenders}
    columns = {"ms beside the model": "{median_ms:.2f}", "update": "{update_ms:.2f}", "loop": "{loop_ms:.2f}",
               "model": "{model_ms:.2f}"}  # fmt: skip
    report(f"What a step costs beside its model, on {device}", columns, result)
    return 0


def _seconds(of_process: world.World, stage: int, steps: int) -> dict[str, float]:
    """The medians of a step's parts."""
    config = RunConfig(
        model=Model(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=128, image_size=32,
                    patch_size=8),
        objective=Objective(name="mae", mae=MAE(decoder_hidden_size=32, decoder_num_hidden_layers=1,
                                                decoder_num_attention_heads=1, decoder_intermediate_size=64)),
        optimizer=Optimizer(clip=1.0),
        train=Train(global_batch=2, micro_batch=2, steps=_WARM_UP + steps),
        parallel=Parallel(zero_stage=stage),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, Training(config, of_process) as training:
        inputs = batch(config, 0, training.backend.device)
        clock = _Clock(training.engine, inputs)
        with StopRequest(RunFolder.at(folder, "run"), of_process) as stop:
            TrainingLoop(
                engine=training.engine, feed=clock, state=TrainState(), total_steps=_WARM_UP + steps, config=config,
                tasks=(), record=lambda file, row: None, say=lambda line: None, causes=CAUSES, stop=stop,
                meters=Meters(),
            ).run()  # fmt: skip
    return clock.medians()


class _Clock:
    """A feed of the same inputs each step, and how long a step and its parts within the engine take."""

    def __init__(self, engine: Engine, inputs: Inputs) -> None:
        self._inputs = inputs
        self._began: list[float] = []  # of each step
        self._spent: dict[str, list[float]] = {"model": [], "update": []}
        engine._forward_backward = self._timed("model", engine._forward_backward)  # type: ignore[method-assign]
        engine._update = self._timed("update", engine._update)  # type: ignore[method-assign]

    def _timed(self, part: str, call: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments, **named)
            self._spent[part].append(time.perf_counter() - began)
            return result

        return timed

    def medians(self) -> dict[str, float]:
        """Of the steps after the first ones, and but for the last, which ends the loop."""
        steps = range(_WARM_UP, len(self._began) - 1)
        whole = [self._began[step + 1] - self._began[step] for step in steps]
        model, update = ([spent[step] for step in steps] for spent in self._spent.values())
        loop = [total - a - b for total, a, b in zip(whole, model, update, strict=True)]
        return {name: statistics.median(own) for name, own in zip(PARTS, (model, update, loop), strict=True)}

    def __next__(self) -> Any:
        self._began.append(time.perf_counter())
        return SimpleNamespace(inputs=self._inputs, names=(), replaced=(), retries=0, epoch=0)

    def run_ahead(self) -> None:
        pass

    def read_seconds(self) -> Mapping[str, float]:
        return {}
