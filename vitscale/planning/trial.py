"""A forward and backward as a run will take them, for the memory that they need: on one rank, without the others."""

from __future__ import annotations

import torch

from vitscale.config.schema import RunConfig
from vitscale.engine.backend import prepare
from vitscale.engine.room import bounded, give_back, is_out_of_memory, memory_in_use, peak_memory
from vitscale.planning.memory import lone_forward, lone_model


def trial(config: RunConfig, device: torch.device, most: int) -> int | None:
    """Bytes that a forward and backward of train.micro_batch images take at most, beside weights and gradients; None
    where there was no memory for them, of `most` with the weights. Whatever they took is free again.

    Nothing is exchanged between ranks, so none waits for one that ran out of memory. train.cuda_graphs, whose memory
    the plan does not know either, is left out.
    """
    peak = None
    try:
        with bounded(device, most):
            peak = _peak(config, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if config.train.compile:
        torch.compiler.reset()  # else another micro-batch would be compiled as one of any size
    give_back(device)
    return peak


def _peak(config: RunConfig, device: torch.device) -> int:
    with device:
        model = lone_model(config).to(device)
    prepare(model, config, device)
    give_back(device)
    before = memory_in_use(device)
    for _ in range(2):  # the first one makes what later ones keep
        output = lone_forward(config, model, config.train.micro_batch)
        output[0].loss.backward()
        del output
    return max(0, peak_memory(device) - before)
