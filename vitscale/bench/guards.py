"""`vitscale bench guards`: what it costs a step that a run is watched: signs of life, guards, fault points, digests.

Each as the training loop calls it, beside a step of the engine (MAE, ZeRO stage 0, one rank, fp32 on a CPU, bf16 on a
GPU). A digest is that of all weights and moments, one each guard.digest_every_steps.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from vitscale import heartbeat, world
from vitscale.bench.gpu_suite.training import LR, Training, batch
from vitscale.bench.measuring import device_name, seconds
from vitscale.bench.peers import run_config
from vitscale.bench.rounds import benchmark_parser, figures, in_turns
from vitscale.config.schema import Train
from vitscale.engine.digest import compare
from vitscale.engine.guard import SampleGuard, SpikeGuard, StepGuard
from vitscale.faults import fault_point
from vitscale.inference.command import above_zero
from vitscale.text import aligned

STEP = "a step"
_CALLS = 10_000


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = benchmark_parser("guards", __doc__)
    parser.add_argument("--preset", default="B", help="Ti, S, B, L, H, g or G (default: %(default)s)")
    parser.add_argument("--batch", type=above_zero, default=8, help="of a step (default: %(default)s)")
    options = parser.parse_args(arguments)
    of_process = world.enter()
    precision = "bf16" if of_process.device == "cuda" else "fp32"
    train = Train(global_batch=options.batch, micro_batch=options.batch, precision=precision)
    config = replace(run_config(options.preset, "mae"), train=train)
    with Training(config, of_process) as training, tempfile.TemporaryDirectory() as folder:
        heartbeat.start(folder, 0)
        engine, device = training.engine, training.backend.device
        inputs = batch(config, 0, device)
        step = partial(seconds, partial(engine.step, [inputs], LR), device=device)
        digest = partial(seconds, lambda: compare(1, engine.replicated(), engine.ranks), device=device)
        every = config.guard.digest_every_steps or 1
        step()
        works: dict[str, Callable[[], float]] = {
            STEP: step,
            "signs of life": partial(_of_call, _signs_of_life(engine.accumulation)),
            "fault points": partial(_of_call, _fault_points(engine.accumulation)),
            "guards of loss, gradient, samples": partial(_of_call, _guards()),
            f"a digest each {every} steps": lambda: digest() / every,
        }
        contenders = figures(in_turns(works, options.rounds), None)
    of_step = contenders[STEP]["median_ms"]
    total = sum(each["median_ms"] for name, each in contenders.items() if name != STEP)
    print(f"What it costs to be watched: a MAE ViT-{options.preset}, batch {options.batch}, on {device_name(device)}")
    rows = [["", "microseconds", "of a step"]]
    for name, each in [*contenders.items(), ("all but the step", {"median_ms": total})]:
        rows.append([name, f"{each['median_ms'] * 1000:,.1f}", f"{each['median_ms'] / of_step:.4%}"])
    print(aligned(rows, right=(1, 2)))
    print(json.dumps({"bench": "guards", **vars(options), "share": total / of_step, "contenders": contenders}))
    return 0


def _of_call(work: Callable[[], None]) -> float:
    """Seconds of one call."""

    def calls() -> None:
        for _ in range(_CALLS):
            work()

    return seconds(calls) / _CALLS


def _signs_of_life(micro_batches: int) -> Callable[[], None]:
    steps = itertools.count(1)

    def tell() -> None:
        for _ in range(micro_batches):
            with heartbeat.phase("data"):
                pass
            heartbeat.advance()
        heartbeat.stepped(next(steps))

    return tell


def _fault_points(micro_batches: int) -> Callable[[], None]:
    def passed() -> None:
        for _ in range(micro_batches):
            fault_point("batch", dict)
        fault_point("step", dict)

    return passed


def _guards() -> Callable[[], None]:
    losses = torch.rand(SpikeGuard.WINDOW, generator=torch.Generator().manual_seed(0)).tolist()
    gradient, samples, spikes = StepGuard(5), SampleGuard(0.01, {}), SpikeGuard(8.0, losses)
    of_step = itertools.cycle(list(losses))

    def note() -> None:
        gradient.note(1, True, dict)
        samples.note({"decode": 0}, 1_000_000, str)
        spikes.note(1, next(of_step), dict)

    return note
