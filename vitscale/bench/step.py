"""`vitscale bench step`: this project's training step beside transformers' and timm's, of MAE or classification.

All have the same sizes, images, precision and AdamW, run in one process and take turns, so that other
load of the machine affects all. A step is forward, backward, AdamW and the clearing of gradients, on
images in the device's memory. Ours is compiled block by block, as `train.compile` does it, a peer as a
whole. A contender that cannot be built or compiled or does not fit in memory is left out, with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.bench.measuring import (
    device_name,
    device_of,
    in_turn,
    memory_status,
    peak_rate,
    reset_peak_memory,
    seconds,
    transformers,
)
from vitscale.bench.model import CLASSES, classifiers
from vitscale.config.model_rules import pair
from vitscale.config.presets import preset
from vitscale.config.schema import Model, Objective, Optimizer, RunConfig
from vitscale.engine.optim import make_optimizer
from vitscale.models.auto import build_model, initialize, vit_config
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.vit import ViTPreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "vitscale"
# (library, compiled or not), the most important first: there may not be time for all.
WITH_COMPILED = ((OURS, True), ("transformers", False), ("transformers", True), ("timm", True), (OURS, False))
EAGER = ((OURS, False), ("transformers", False), ("timm", False))


@dataclass
class Contender:
    """A model with its optimizer, ready to step, and what it was measured at."""

    name: str
    step: Callable[[], Tensor]
    memory: int  # peak bytes of model, optimizer, activations and gradients
    loss: float
    preparation: float  # seconds that building it and its first two steps took: compiling, most of all
    seconds: list[float] = field(default_factory=list)  # of a step, one figure a round


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    result = measure(arguments)
    _print(result)
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitscale bench step", description=__doc__.split("\n")[0])
    parser.add_argument("--objective", choices=("mae", "classification"), default="mae", help="default: mae")
    parser.add_argument("--preset", default="S", help="Ti, S, B, L, H, g or G (default: S)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="bf16 is autocast (default: fp32)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="compiled models too, and eager ones of timm not (default: on a GPU)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--steps", type=int, default=None, help="steps a turn (default: 1, on a GPU 10)")
    parser.add_argument("--seconds", type=float, default=3600.0,
                        help="begin with no contender that would take longer in all (default: 3600)")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: the GPU where there is one")
    parser.add_argument("--peak", type=float, default=None, help="TFLOP/s of the device (default: known or measured)")
    return parser


def measure(
    arguments: Sequence[str],
    note: Callable[[dict[str, Any]], None] = lambda result: None,
    most: int | None = None,
) -> dict[str, Any]:
    """What `main` prints as JSON. note: called with the result so far after each contender; most: at most so many.

    Contenders are prepared one after the other; after each, all that are ready are measured again in turns.
    """
    options = _parser().parse_args(arguments)
    began, device = time.monotonic(), device_of(options.device)
    torch.compiler.reset()  # what was compiled before counts against torch's limit of variants
    if options.compile is None:
        options.compile = device.type == "cuda"
    torch.manual_seed(0)
    sizes = Model(preset=options.preset, num_labels=CLASSES, **preset(options.preset))
    run = RunConfig(model=sizes, objective=Objective(name=options.objective))
    config = vit_config(run)
    images = torch.randn(options.batch, config.num_channels, *pair(config.image_size), device=device)
    labels = torch.randint(CLASSES, (options.batch,), device=device)
    builders = _builders(options.preset, config)
    result = _describe(options, run, device)
    # What the libraries take for themselves at their first step is no contender's.
    small = _builders(options.preset, replace(config, num_hidden_layers=1))[OURS]
    _contender("warm-up", small, False, images, labels, options)
    ready: list[Contender] = []
    longest = {True: 0.0, False: 0.0}  # preparation so far, compiled and eager
    entered = [one for one in (WITH_COMPILED if options.compile else EAGER) if one[0] in builders]
    for library, compiled in entered[:most]:
        name = f"{library} {'compiled' if compiled else 'eager'}"
        if time.monotonic() - began + longest[compiled] > options.seconds:
            result["left_out"][name] = f"no time left of {options.seconds:.0f} s"
            continue
        try:
            ready.append(_contender(name, builders[library], compiled, images, labels, options))
        except Exception as error:  # whatever a library, a compiler or the memory has against it
            result["left_out"][name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            continue
        longest[compiled] = max(longest[compiled], ready[-1].preparation)
        _take_turns(ready, options, device)
        result |= _figures(ready, options, result)
        note(result)
    return result


def _builders(name: str, config: ViTConfig) -> dict[str, Callable[[], nn.Module]]:
    """The models by their library, none built yet; timm has no MAE."""
    if not isinstance(config, ViTMAEConfig):
        return classifiers(name, config)

    def ours() -> nn.Module:
        model = ViTMAEForPreTraining(config)
        initialize(model, seed=0)
        return model

    def of_transformers() -> nn.Module:
        library = transformers()
        content = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        return library.ViTMAEForPreTraining(library.ViTMAEConfig(**content))

    return {OURS: ours, "transformers": of_transformers}


def _contender(
    name: str,
    build: Callable[[], nn.Module],
    compiled: bool,
    images: Tensor,
    labels: Tensor,
    options: argparse.Namespace,
) -> Contender:
    """Build it and take two steps to warm up (and compile), during which its memory is measured."""
    began, device = time.monotonic(), images.device
    before = _start_memory(device)
    model = build().to(device).train()
    if compiled:
        _compile(model)
    optimizer = make_optimizer(model, Optimizer(), fused=True)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")

    def step() -> Tensor:
        with autocast:
            loss = _loss(model, images, None if options.objective == "mae" else labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step()
    loss = float(step())
    return Contender(name, step, _peak_memory(device) - before, loss, time.monotonic() - began)


def _compile(model: nn.Module) -> None:
    if isinstance(model, ViTPreTrainedModel):
        model.compile_blocks()
    else:
        model.compile()


def _loss(model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    """The loss of any library's model; MAE has no labels."""
    inputs: dict[str, Any] = {} if labels is None else {"labels": labels}
    if isinstance(model, ViTPreTrainedModel):
        return model(images, sample_key=torch.arange(len(images), device=images.device), **inputs).loss
    if type(model).__module__.startswith("timm."):
        assert labels is not None
        return F.cross_entropy(model(images), labels)
    return model(images, **inputs).loss


def _take_turns(contenders: Sequence[Contender], options: argparse.Namespace, device: torch.device) -> None:
    """Measure all again, so that all figures are of the same rounds."""
    steps = options.steps or (10 if device.type == "cuda" else 1)
    for contender in contenders:
        contender.seconds.clear()
    for round_number in range(options.rounds):
        for contender in in_turn(contenders, round_number):
            contender.seconds.append(seconds(contender.step, steps, device))


def _start_memory(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return reset_peak_memory()


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_status("VmHWM")


def _describe(options: argparse.Namespace, run: RunConfig, device: torch.device) -> dict[str, Any]:
    """What is measured, on what; `contenders` is still empty."""
    with torch.device("meta"):
        model = build_model(run)
    given = None if options.peak is None else (options.peak * 1e12, "given")
    peak, source = given or peak_rate(device, DTYPES[options.precision])
    return {
        "bench": "step",
        "device": device_name(device),
        **{name: getattr(options, name) for name in ("objective", "preset", "batch", "precision", "rounds")},
        "gflop_per_image": model.flops_per_image() / 1e9,
        "peak_tflops": peak / 1e12,
        "peak_source": source,
        "contenders": {},
        "fastest_peer": None,
        "left_out": {},
    }


def _figures(ready: Sequence[Contender], options: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """The contenders' figures; a ratio is the median over the rounds of the fastest peer's time over one's own."""
    peers = [contender for contender in ready if not contender.name.startswith(OURS)]
    peer = min(peers, key=lambda each: statistics.median(each.seconds), default=None)
    figures = {}
    for contender in ready:
        rate = options.batch / statistics.median(contender.seconds)
        ratios = [theirs / own for theirs, own in zip(peer.seconds, contender.seconds, strict=True)] if peer else []
        figures[contender.name] = {
            "images_per_second": rate,
            "utilization": rate * result["gflop_per_image"] / result["peak_tflops"] / 1e3,
            "ratio": statistics.median(ratios) if ratios else None,
            "peak_memory_mib": contender.memory / 2**20,
            "preparation_seconds": contender.preparation,
            "loss": contender.loss,
            "step_seconds": list(contender.seconds),
        }
    libraries = ("torch", "transformers", "timm")
    versions = {name: sys.modules[name].__version__ for name in libraries if sys.modules.get(name)}
    return {"contenders": figures, "fastest_peer": peer.name if peer else None, "versions": versions}


def _print(result: dict[str, Any]) -> None:
    print("{objective} ViT-{preset}, batch {batch}, {precision}, on {device}".format(**result))
    for name, measured in result["contenders"].items():
        ratio = "" if measured["ratio"] is None else f"   ratio {measured['ratio']:.3f}"
        print(
            f"{name:>22} {measured['images_per_second']:10.1f} images/s   {measured['utilization']:6.1%} of peak"
            f"   {measured['peak_memory_mib']:8.0f} MiB   ready after {measured['preparation_seconds']:.0f} s{ratio}"
        )
    for name, reason in result["left_out"].items():
        print(f"{name} is left out: {reason}")
    print("ratios to the fastest peer; peak {peak_tflops:.2f} TFLOP/s ({peak_source}); {gflop_per_image:.1f} GFLOP an "
          "image".format(**result))  # fmt: skip
