"""`vitscale bench memory`: what `vitscale plan` says of a step's memory, beside the memory that the step takes.

By stage and kind of gradient checkpointing, each in a process of its own. On a GPU the measured figure is torch's
own peak; on a CPU every tensor of a step is counted as long as it lives, and AdamW, which is not fused there, has its
temporaries.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from vitscale import world
from vitscale.bench.gpu_suite.training import LR, Training, batch
from vitscale.bench.measuring import device_name
from vitscale.bench.peers import run_config
from vitscale.config.schema import CHECKPOINTING, Parallel, RunConfig, Train
from vitscale.inference.command import above_zero
from vitscale.planning.live import LiveBytes
from vitscale.planning.memory import activations, memory, parameters
from vitscale.text import aligned

_STEPS = 2  # the first one makes what later ones keep
_LETTING_GO_S = 0.2


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="vitscale bench memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="S", metavar="P", help="Ti, S, B, L, H, g or G (default: S)")
    parser.add_argument("--objective", choices=("mae", "classification"), default="mae", help="(default: mae)")
    parser.add_argument("--batch", type=above_zero, default=16, help="micro-batch (default: 16)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=(0, 1, 2, 3))
    options = parser.parse_args(arguments)
    of_process = world.enter()
    base = run_config(options.preset, options.objective)
    train = Train(global_batch=options.batch, micro_batch=options.batch, precision="bf16")
    contenders = {}
    for stage, again in product(options.stages, CHECKPOINTING):
        config = replace(base, parallel=Parallel(zero_stage=stage), train=replace(train, gradient_checkpointing=again))
        kind = "selective " if again == "selective" else ""
        name = f"ZeRO-{stage}" + (f", {kind}gradient checkpointing" if again else "")
        # What an engine leaves behind would add up.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            contenders[name] = process.submit(_compared, config).result()
    rows = [["", "planned MB", "measured MB", "ratio"]]
    for name, each in contenders.items():
        rows.append([name, f"{each['planned'] / 1e6:,.0f}", f"{each['measured'] / 1e6:,.0f}", f"{each['ratio']:.3f}"])
    device = device_name(torch.device(of_process.device))
    print(f"Peak memory of a step of ViT-{options.preset}, {options.objective}, batch {options.batch}, on {device}")
    print(aligned(rows, right=(1, 2, 3)))
    print(json.dumps({"bench": "memory", **vars(options), "device": device, "contenders": contenders}))
    return 0


def _compared(config: RunConfig) -> dict[str, Any]:
    return compared(config, world.enter())


def compared(config: RunConfig, of_process: world.World) -> dict[str, Any]:
    """Bytes `planned` and `measured`, and their `ratio`."""
    step = activations(config).of(config.train.micro_batch)
    needed = memory(config, of_process, parameters(config), step)
    planned = needed.allocated_bytes - needed.inputs  # here no next batch is on its way
    measured = peak(config, of_process)
    return {"planned": planned, "measured": measured, "ratio": planned / measured}


def peak(config: RunConfig, of_process: world.World) -> int:
    """The most bytes that a step of a new engine has in use."""
    before = torch.autograd.is_multithreading_enabled()
    torch.autograd.set_multithreading_enabled(False)  # a backward in a thread of its own is not counted
    try:
        with LiveBytes() as live, Training(config, of_process) as training:
            device = training.backend.device
            inputs = batch(config, 0, device)
            for _ in range(_STEPS):
                live.start_again()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                training.engine.step([inputs], LR)
            # gloo's threads want the interpreter to let go of `live`, while the group's end makes it wait for them.
            time.sleep(_LETTING_GO_S)
            return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else live.peak
    finally:
        torch.autograd.set_multithreading_enabled(before)
