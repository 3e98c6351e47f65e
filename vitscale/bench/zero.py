"""`vitscale bench zero`: what a ZeRO stage costs the host, by steps of a MAE of ViT-B's tensors, each of them tiny.

Their kernels take next to nothing, so a step is what the host does for it: that is what a GPU waits for where its own
part is short. Each stage as it is, and as DeepSpeed does it by itself (without engine/zero_host.py), beside DDP; in one
process, bf16, not compiled. On a GPU it is the GPU's host that is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from vitscale import world
from vitscale.bench.gpu_suite.training import LR, Training, batch
from vitscale.bench.measuring import device_name, seconds
from vitscale.bench.rounds import benchmark_parser, figures, in_turns, report
from vitscale.config.schema import MAE, Model, Objective, Optimizer, Parallel, RunConfig, Train
from vitscale.engine import zero
from vitscale.inference.command import above_zero

DDP = "DDP"
_WARM_UP = 3  # steps of each


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = benchmark_parser("zero", __doc__, rounds=3)
    parser.add_argument("--steps", type=above_zero, default=20, help="of a turn (default: %(default)s)")
    options = parser.parse_args(arguments)
    of_process = world.enter()
    works = {DDP: partial(_step_seconds, of_process, 0, options.steps, own=False)}
    for stage in (1, 2, 3):
        works[f"ZeRO-{stage}"] = partial(_step_seconds, of_process, stage, options.steps, own=False)
        works[f"ZeRO-{stage}, DeepSpeed by itself"] = partial(_step_seconds, of_process, stage, options.steps, own=True)
    contenders = figures(in_turns(works, options.rounds), DDP)
    device = device_name(torch.device(of_process.device))
    result = {"bench": "zero", **vars(options), "device": device, "contenders": contenders}
    report(f"A step of 252 tiny tensors, on {device}", {"ms a step": "{median_ms:.1f}"}, result)
    return 0


def _step_seconds(of_process: world.World, stage: int, steps: int, own: bool) -> float:
    """The median step's."""
    decoder = MAE(decoder_hidden_size=16, decoder_num_attention_heads=1, decoder_intermediate_size=16)
    config = RunConfig(
        model=Model(hidden_size=16, num_attention_heads=1, intermediate_size=16, image_size=32, patch_size=8),
        objective=Objective(name="mae", mae=decoder),
        optimizer=Optimizer(clip=1.0),
        train=Train(global_batch=2, micro_batch=2, precision="bf16"),
        parallel=Parallel(zero_stage=stage),
    )
    with _deepspeed_by_itself(own), Training(config, of_process) as training:
        inputs, device = batch(config, 0, training.backend.device), training.backend.device
        step = partial(training.engine.step, [inputs], LR)
        times = [seconds(step, device=device) for _ in range(_WARM_UP + steps)]
    return statistics.median(times[_WARM_UP:])


@contextmanager
def _deepspeed_by_itself(own: bool) -> Iterator[None]:
    spare = zero.spare_the_host
    if own:
        zero.spare_the_host = lambda *_: None
    try:
        yield
    finally:
        zero.spare_the_host = spare
