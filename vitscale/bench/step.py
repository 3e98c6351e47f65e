"""`vitscale bench step`: this project's MAE training step beside that of transformers' ViTMAEForPreTraining.

Both have the same sizes, images, precision, AdamW and (asked for) block-wise compile, in one process,
and take turns, so that what else the machine does falls on both. A step is forward, backward, AdamW
and the clearing of gradients, on images that are there already.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.bench.measuring import device_name, device_of, in_turn, seconds, transformers
from vitscale.config.check import pair
from vitscale.config.presets import preset
from vitscale.config.schema import Model, Optimizer, RunConfig
from vitscale.engine.optim import make_optimizer
from vitscale.models.auto import initialize, vit_config
from vitscale.models.mae import ViTMAEConfig, ViTMAEForPreTraining

# Dense bf16 FLOP/s of a large matrix product, measured; of others, and of CPUs, it is measured in the run.
MEASURED_PEAKS = {"H200": 790e12}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Contender:
    """A model with its optimizer, ready to step, and what it was measured at."""

    name: str
    step: Callable[[], Tensor]
    memory: int  # peak bytes of model, optimizer, activations and gradients
    loss: float
    seconds: list[float] = field(default_factory=list)  # of a step, one figure a round


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    options = _parser().parse_args(arguments)
    device = device_of(options.device)
    torch.manual_seed(0)
    peer = transformers()
    config = vit_config(RunConfig(model=Model(preset=options.preset, **_sizes(options.preset))))
    assert isinstance(config, ViTMAEConfig)
    with torch.device("meta"):
        flops = ViTMAEForPreTraining(config).flops_per_image()
    images = torch.randn(options.batch, config.num_channels, *pair(config.image_size), device=device)
    inputs = {"pixel_values": images, "sample_key": torch.arange(len(images), device=device)}
    peak, source = _peak(options, device)
    # What the libraries take for themselves at their first step is no contender's.
    _contender("warm-up", lambda: _own_model(replace(config, num_hidden_layers=1)), inputs, options, device)
    ours = _contender("vitscale", lambda: _own_model(config), inputs, options, device)
    theirs = _contender("transformers", lambda: _peer_model(peer, config), {"pixel_values": images}, options, device)
    steps = options.steps or (10 if device.type == "cuda" else 1)
    for round_number in range(options.rounds):
        for contender in in_turn((ours, theirs), round_number):
            contender.seconds.append(seconds(contender.step, steps, device))
    _report(ours, theirs, options, device_name(device), flops, peak, source)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitscale bench step", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="S", help="Ti, S, B, L, H, g or G (default: S)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="bf16 is autocast (default: fp32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each block, in both")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--steps", type=int, default=None, help="steps a turn (default: 1, on a GPU 10)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: the GPU where there is one")
    parser.add_argument("--peak", type=float, default=None, help="TFLOP/s of the device (default: known or measured)")
    return parser


def _sizes(name: str) -> dict[str, Any]:
    return dict(preset(name))


def _own_model(config: ViTMAEConfig) -> nn.Module:
    model = ViTMAEForPreTraining(config)
    initialize(model, seed=0)
    return model


def _peer_model(peer: ModuleType, config: ViTMAEConfig) -> nn.Module:
    """Its model of the same sizes, with its fused attention."""
    content = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    return peer.ViTMAEForPreTraining(peer.ViTMAEConfig(**content))


def _contender(
    name: str,
    build: Callable[[], nn.Module],
    inputs: dict[str, Tensor],
    options: argparse.Namespace,
    device: torch.device,
) -> Contender:
    """Build it and take two steps to warm up (and compile), during which its memory is measured."""
    before = _start_memory(device)
    model = build().to(device).train()
    if options.compile:
        for block in [module for module in model.modules() if type(module).__name__ in ("ViTLayer", "ViTMAELayer")]:
            block.compile()
    optimizer = make_optimizer(model, Optimizer(), fused=True)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")

    def step() -> Tensor:
        with autocast:
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step()
    loss = float(step())
    return Contender(name, step, _peak_memory(device) - before, loss)


def _start_memory(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts for no one
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    return _status("VmRSS")


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"no {key} in /proc/self/status"
    return int(found[1]) * 1024


def _peak(options: argparse.Namespace, device: torch.device) -> tuple[float, str]:
    """FLOP/s that the device can do at this precision, and how that is known."""
    if options.peak is not None:
        return options.peak * 1e12, "given"
    name = device_name(device)
    for known, peak in MEASURED_PEAKS.items():
        if known in name and options.precision == "bf16":
            return peak, f"a {known}'s dense bf16, measured"
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=DTYPES[options.precision]) for _ in range(2))
    best = min(seconds(lambda: left @ right, 1, device) for _ in range(6))
    return 2 * side**3 / best, f"a {side} x {side} matrix product in this run"


def _report(
    ours: Contender, theirs: Contender, options: argparse.Namespace, device: str, flops: int, peak: float, source: str
) -> None:
    result: dict[str, Any] = {
        "bench": "step",
        "device": device,
        "torch": torch.__version__,
        "transformers": sys.modules["transformers"].__version__,
        **{name: getattr(options, name) for name in ("preset", "batch", "precision", "compile", "rounds")},
        "gflop_per_image": flops / 1e9,
        "peak_tflops": peak / 1e12,
        "peak_source": source,
    }
    print(f"MAE ViT-{options.preset}, batch {options.batch}, {options.precision}, "
          f"{'compiled' if options.compile else 'eager'}, on {device}")  # fmt: skip
    for contender in (ours, theirs):
        rate = options.batch / statistics.median(contender.seconds)
        result[contender.name] = {
            "images_per_second": rate,
            "utilization": rate * flops / peak,
            "peak_memory_mib": contender.memory / 2**20,
            "loss": contender.loss,
            "step_seconds": contender.seconds,
        }
        print(f"{contender.name:>14} {rate:10.1f} images/s   {rate * flops / peak:6.1%} of peak   "
              f"{contender.memory / 2**20:8.0f} MiB")  # fmt: skip
    result["ratio"] = result["vitscale"]["images_per_second"] / result["transformers"]["images_per_second"]
    print(f"ratio {result['ratio']:.3f}; peak {peak / 1e12:.2f} TFLOP/s ({source}); {flops / 1e9:.1f} GFLOP an image")
    print(json.dumps(result))
