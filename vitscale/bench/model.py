"""`vitscale bench model`: this project's ViT beside transformers' and timm's of the same size.

fp32, forward (inference) and forward + backward (of a classification loss), on the same images, in one
process. All take turns, so that what else the machine does falls on all; a ratio is the median over the
turns of the faster peer's time over one's own. A peer that cannot be imported is left out, and that is said.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.bench.measuring import device_name, device_of, in_turn, seconds, transformers
from vitscale.config.model_rules import pair
from vitscale.config.presets import preset
from vitscale.errors import ConfigError
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig

CLASSES = 1000
TIMM_NAMES = {"Ti": "vit_tiny_patch16_224", "S": "vit_small_patch16_224", "B": "vit_base_patch16_224",
              "L": "vit_large_patch16_224", "H": "vit_huge_patch14_224"}  # fmt: skip
PEERS, VERSIONS = ("timm", "transformers"), ("torch", "timm", "transformers", "onnxruntime")
FORWARD, BOTH = "forward", "forward + backward"
# What a user's first line costs; the first is Python itself, to be taken off the others.
IMPORTS = ("pass", "import vitscale", "from vitscale import ViTModel", "import torch",
           "from transformers import ViTModel")  # fmt: skip


@dataclass
class Contender:
    """A way to run the model, ready to go, and what it was measured at."""

    name: str
    steps: dict[str, Callable[[], Any]]  # by what it does
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of a step, one figure a round

    def median(self, kind: str) -> float:
        return statistics.median(self.seconds[kind])


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    options = _parser().parse_args(arguments)
    device = device_of("cpu" if options.onnx and options.device is None else options.device)
    if options.onnx and device.type != "cpu":
        raise ConfigError("--onnx: is measured on the CPU; leave --device=cuda away")
    torch.manual_seed(0)
    config = ViTConfig(**preset(options.preset), layer_norm_eps=1e-6, num_labels=CLASSES)
    images = torch.randn(options.batch, config.num_channels, *pair(config.image_size), device=device)
    labels = torch.randint(CLASSES, (options.batch,), device=device)
    models, left_out = {}, {}
    for name, build in classifiers(options.preset, config).items():
        try:
            models[name] = build().to(device)
        except (ImportError, RuntimeError) as error:  # a broken torchvision raises RuntimeError
            if name not in PEERS:
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    contenders = [_contender(name, model, images, labels) for name, model in models.items()]
    if options.onnx:
        contenders += _exported(models["vitscale"], images)
    _take_turns(contenders, options, device)
    imports = _import_seconds(options.rounds) if options.imports else {}
    _report(contenders, left_out, imports, options, device_name(device))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitscale bench model", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=tuple(TIMM_NAMES), default="S", help="the size (default: S)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--onnx", action="store_true", help="also the exported model in onnxruntime, fp32 and int8")
    parser.add_argument("--imports", action="store_true", help="also how long it takes to import the packages")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--steps", type=int, default=None, help="steps a turn (default: 1, on a GPU 10)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: the GPU where there is one")
    return parser


def classifiers(name: str, config: ViTConfig) -> dict[str, Callable[[], nn.Module]]:
    """The models of preset `name` by their library, none built yet."""

    def ours() -> nn.Module:
        model = ViTForImageClassification(config)
        initialize(model, seed=0)
        return model

    def of_transformers() -> nn.Module:
        library = transformers()
        content = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        return library.ViTForImageClassification(library.ViTConfig(**content))

    def of_timm() -> nn.Module:
        return importlib.import_module("timm").create_model(TIMM_NAMES[name], num_classes=CLASSES)

    # timm before transformers, who hides a broken torchvision from everyone after it.
    return {"vitscale": ours, "timm": of_timm, "transformers": of_transformers}


def _contender(name: str, model: nn.Module, images: Tensor, labels: Tensor) -> Contender:
    """Its steps, each run once to warm up."""

    def logits() -> Tensor:
        found = model(images)
        return found if isinstance(found, Tensor) else found.logits

    @torch.inference_mode()
    def forward() -> Tensor:
        model.eval()
        return logits()

    def both() -> None:
        model.train()
        F.cross_entropy(logits(), labels).backward()
        model.zero_grad(set_to_none=True)

    forward()
    both()
    return Contender(name, {FORWARD: forward, BOTH: both})


def _exported(model: nn.Module, images: Tensor) -> list[Contender]:
    """Our model by onnxruntime on the CPU: as it is, and in int8 both ways (the ranges from `images` for static)."""
    from vitscale.export.onnx import open_onnx, write_onnx
    from vitscale.export.quantize import quantize_onnx
    from vitscale.export.served import Served, trace

    assert isinstance(model, ViTForImageClassification)
    served = Served(model)
    with tempfile.TemporaryDirectory() as folder:
        plain, dynamic, static = (Path(folder, f"{name}.onnx") for name in ("plain", "dynamic", "static"))
        write_onnx(served, trace(served), plain)
        quantize_onnx(plain, dynamic, None)
        quantize_onnx(plain, static, [images])
        runs = {
            "ONNX": open_onnx(plain),
            "ONNX, int8 dynamic": open_onnx(dynamic),
            "ONNX, int8 static": open_onnx(static),
        }
    for run in runs.values():
        run(images)
    return [Contender(name, {FORWARD: partial(run, images)}) for name, run in runs.items()]


def _take_turns(contenders: Sequence[Contender], options: argparse.Namespace, device: torch.device) -> None:
    steps = options.steps or (10 if device.type == "cuda" else 1)
    for kind in (FORWARD, BOTH):
        able = [contender for contender in contenders if kind in contender.steps]
        for round_number in range(options.rounds):
            for contender in in_turn(able, round_number):
                contender.seconds.setdefault(kind, []).append(seconds(contender.steps[kind], steps, device))


def _import_seconds(rounds: int) -> dict[str, list[float]]:
    """Seconds of new Python processes that run each of IMPORTS, one figure a round; empty where it fails."""
    cpu, taken = torch.device("cpu"), {line: list[float]() for line in IMPORTS}
    for line in IMPORTS:  # files into the page cache, and what cannot be imported away
        if subprocess.run([sys.executable, "-c", line], capture_output=True).returncode:
            del taken[line]
    for round_number in range(rounds):
        for line in in_turn(list(taken), round_number):
            command = [sys.executable, "-c", line]
            taken[line].append(seconds(lambda command=command: subprocess.run(command, check=True), 1, cpu))  # type: ignore[misc]
    return taken


def _report(
    contenders: Sequence[Contender],
    left_out: dict[str, str],
    imports: dict[str, list[float]],
    options: argparse.Namespace,
    device: str,
) -> None:
    result: dict[str, Any] = {
        "bench": "model",
        "device": device,
        "versions": {name: sys.modules[name].__version__ for name in VERSIONS if sys.modules.get(name)},
        **{name: getattr(options, name) for name in ("preset", "batch", "rounds")},
        "left_out": left_out,
        "import_seconds": imports,
    }
    print(f"ViT-{options.preset}, batch {options.batch}, fp32, on {device}")
    for kind in (FORWARD, BOTH):
        measured = {each.name: each for each in contenders if kind in each.seconds}
        peer = min(
            (measured[name] for name in PEERS if name in measured), key=lambda each: each.median(kind), default=None
        )
        result[kind] = {"seconds": {name: each.seconds[kind] for name, each in measured.items()}}
        print(f"{kind}:" + (f" beside {peer.name}, the faster peer" if peer else ""))
        for name, contender in measured.items():
            milliseconds = contender.median(kind) * 1000
            line = f"{name:>24} {milliseconds:9.1f} ms {options.batch / milliseconds * 1000:9.2f} images/s"
            if peer is not None:
                ratios = [theirs / own for theirs, own in zip(peer.seconds[kind], contender.seconds[kind], strict=True)]
                line += f"   ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
                result[kind].setdefault("ratio", {})[name] = statistics.median(ratios)
            print(line)
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    bare = statistics.median(imports["pass"]) if imports else 0.0
    for line, taken in imports.items():
        print(f"{line:>34} {statistics.median(taken):8.3f} s, {statistics.median(taken) - bare:.3f} without Python")
    if imports:
        print("".join(f"{line}: cannot be run here, left out\n" for line in IMPORTS if line not in imports), end="")
    print(json.dumps(result))
