"""This project's models beside transformers' and timm's: of the same sizes, on the same images, in turns.

All run in one process, on images in the device's memory. Ours is compiled block by block, as `train.compile` does
it, a peer as a whole. A contender that cannot be built or compiled, does not fit in memory or gives values that are
not finite is left out, with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from vitscale.bench.measuring import (
    Parts,
    device_name,
    device_of,
    peak_memory,
    peak_rate,
    reserved_memory,
    seconds,
    start_memory,
    synchronize,
)
from vitscale.bench.rounds import benchmark_parser, fastest, figures, first_line, in_turns, report
from vitscale.config.model_rules import pair
from vitscale.config.presets import preset
from vitscale.config.schema import Model, Objective, RunConfig
from vitscale.engine.graphs import graph_blocks
from vitscale.inference.command import above_zero
from vitscale.interop.vision_transformer import mlp_ratio
from vitscale.models.auto import build_model, new_model, vit_config
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.positions import sincos_table
from vitscale.models.vit import ViTPreTrainedModel

OURS = "vitscale"
PEERS = ("timm", "transformers")
CLASSES = 1000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_TIME = "no time left"  # what a reason to be left out begins with where it is that
GRAPHED = "by CUDA graphs"  # compiled too; of a peer by torch's mode="reduce-overhead"
# (library, how), the most important first: there may not be time for all.
WITH_COMPILED = (
    (OURS, "compiled"), ("transformers", "eager"), (OURS, GRAPHED), ("transformers", "compiled"), ("timm", "compiled"),
    ("transformers", GRAPHED), ("timm", GRAPHED), (OURS, "eager"),
)  # fmt: skip
# timm before transformers: `import_transformers` hides a broken torchvision from all that come after it.
EAGER = ((OURS, "eager"), ("timm", "eager"), ("transformers", "eager"))
Step = Callable[[], Tensor]  # what is measured; what it returns must be finite
Note = Callable[[dict[str, Any]], None]


def models_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options of a benchmark of models."""
    parser = benchmark_parser(name, description)
    parser.add_argument("--preset", default="S", help="Ti, S, B, L, H, g or G (default: %(default)s)")
    parser.add_argument("--batch", type=above_zero, default=8, help="images a step (default: %(default)s)")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="bf16 is autocast (default: fp32)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="compiled models too, and eager ones of timm not (default: on a GPU)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=3600.0,
                        help="begin with no contender that would take longer in all (default: 3600)")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: the GPU where there is one")
    parser.add_argument("--peak", type=float, default=None, help="TFLOP/s of the device (default: measured)")
    return parser


def run_config(size: str, objective: str) -> RunConfig:
    """A run whose model has a preset's sizes and CLASSES classes."""
    model = Model(preset=size, num_labels=CLASSES, **preset(size))
    return RunConfig(model=model, objective=Objective(name=objective))


def builders(run: RunConfig) -> dict[str, Callable[[], nn.Module]]:
    """By library, what builds its model of the run's sizes, on the CPU."""
    config = vit_config(run)
    return {
        OURS: partial(new_model, run, seed=0),
        "transformers": partial(_transformers_model, config),
        "timm": partial(TimmMAE, config) if isinstance(config, ViTMAEConfig) else partial(_timm_model, config),
    }


def _transformers_model(config: ViTConfig) -> nn.Module:
    library = import_transformers()
    keys = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    if isinstance(config, ViTMAEConfig):
        return library.ViTMAEForPreTraining(library.ViTMAEConfig(**keys))
    return library.ViTForImageClassification(library.ViTConfig(**keys))


def _timm_model(config: ViTConfig) -> nn.Module:
    """The class and defaults of timm's vit_*_patch*_224, with these sizes."""
    return importlib.import_module("timm.models.vision_transformer").VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.num_labels,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
    )


class TimmMAE(nn.Module):
    """MaskedAutoencoderViT, the MAE paper's models_mae.py, put together of timm's parts as it is there, with its names.

    Initial values are the parts' own.
    """

    def __init__(self, config: ViTMAEConfig) -> None:
        super().__init__()
        timm_vit = importlib.import_module("timm.models.vision_transformer")
        norm = partial(nn.LayerNorm, eps=1e-6)
        width, decoder = config.hidden_size, config.decoder_hidden_size
        ratio = mlp_ratio(config.intermediate_size, width)
        block = partial(timm_vit.Block, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm)
        self.config, self.patch = config, pair(config.patch_size)
        self.patch_embed = timm_vit.PatchEmbed(pair(config.image_size), self.patch, config.num_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_table(width, config.grid), requires_grad=False)
        self.blocks = nn.ModuleList(block(width, config.num_attention_heads) for _ in range(config.num_hidden_layers))
        self.norm = norm(width)
        self.decoder_embed = nn.Linear(width, decoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder))
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder, config.grid), requires_grad=False)
        heads, layers = config.decoder_num_attention_heads, config.decoder_num_hidden_layers
        self.decoder_blocks = nn.ModuleList(block(decoder, heads) for _ in range(layers))
        self.decoder_norm = norm(decoder)
        self.decoder_pred = nn.Linear(decoder, config.patch_values)

    def encode(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Tokens of the patches `kept` [n, visible], of all without it, after the class token."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        if kept is not None:
            x = torch.gather(x, 1, kept.unsqueeze(-1).repeat(1, 1, x.shape[-1]))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """[n, patches, patch_values], from the visible patches' tokens."""
        x = self.decoder_embed(tokens)
        hidden = self.mask_token.repeat(len(x), restore.shape[1] + 1 - x.shape[1], 1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = torch.gather(patches, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss and [n, patches, patch_values]; noise: [n, patches], whose largest are hidden (default: random)."""
        if noise is None:
            noise = torch.rand(len(images), self.config.num_patches, device=images.device)
        shuffle, visible = torch.argsort(noise, dim=1), self.config.visible_patches
        restore = torch.argsort(shuffle, dim=1)
        predicted = self.decode(self.encode(images, shuffle[:, :visible]), restore)
        mask = (restore >= visible).float()
        (p, q), (rows, columns) = self.patch, self.config.grid
        target = images.reshape(len(images), -1, rows, p, columns, q)
        target = torch.einsum("nchpwq->nhwpqc", target).reshape(predicted.shape)
        if self.config.norm_pix_loss:
            mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        error = ((predicted - target) ** 2).mean(dim=-1)
        return (error * mask).sum() / mask.sum(), predicted


def import_transformers() -> ModuleType:
    """transformers, also where torchvision is installed but cannot be loaded."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # transformers then does without
    return importlib.import_module("transformers")


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The scores (batch, CLASSES) of any library's classifier."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


@dataclass(frozen=True)
class Contender:
    """A model that is ready to step, and what it took to get there."""

    step: Step
    memory: int  # peak bytes: model, activations and, in training, gradients and optimizer
    reserved: int | None  # by torch, on a GPU
    preparation: float  # seconds to build it and of its first two steps: compiling, most of all


class Comparison:
    """The models of one benchmark, what they work on, and the result so far."""

    def __init__(self, options: argparse.Namespace, run: RunConfig, trains: bool) -> None:
        """trains: whether a step is one of training."""
        self.options = options
        self.run = run
        self.trains = trains
        self.device = device_of(options.device)
        self.parts = Parts(self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16")
        torch.manual_seed(0)
        size = (options.batch, run.model.num_channels, *pair(run.model.image_size))
        self.images = torch.randn(size, device=self.device)
        self.labels = torch.randint(CLASSES, (options.batch,), device=self.device)
        self._ready: dict[str, Contender] = {}
        if options.peak is None:
            peak, source = peak_rate(self.device, DTYPES[options.precision])
        else:
            peak, source = options.peak * 1e12, "given"
        with torch.device("meta"):
            model = build_model(run)
        flops = model.flops_per_image() if trains else model.forward_flops()
        self.result: dict[str, Any] = {
            "objective": run.objective.name,
            **{name: getattr(options, name) for name in ("preset", "batch", "precision", "rounds")},
            "device": device_name(self.device),
            "gflop_per_image": flops / 1e9,
            "gflop_source": f"{'3 x ' * trains}the matrix products of a forward",
            "peak_tflops": peak / 1e12,
            "peak_source": source,
            "contenders": {},
            "fastest_peer": None,
            "left_out": {},
        }

    def starts(self, make_step: Callable[[nn.Module], Step]) -> dict[str, Callable[[], Step]]:
        """By contender, what builds its model and gives its step, the most important first; none is built yet."""
        graphs = self.trains and self.device.type == "cuda"
        compiled = self.device.type == "cuda" if self.options.compile is None else self.options.compile
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # as in a run; beyond it torch goes on uncompiled
        build = builders(self.run)
        # What the libraries take for themselves at their first step is no contender's.
        small = replace(self.run, model=replace(self.run.model, num_hidden_layers=1))
        self._prepare(partial(self._start, builders(small)[OURS], "eager", make_step))
        return {
            f"{library} {how}": partial(self._start, build[library], how, make_step)
            for library, how in (WITH_COMPILED if compiled else EAGER)
            if library in build and (how != GRAPHED or graphs)
        }

    def _start(self, build: Callable[[], nn.Module], how: str, make_step: Callable[[nn.Module], Step]) -> Step:
        model = build().to(self.device)
        if how != "eager" and isinstance(model, ViTPreTrainedModel):
            model.compile_blocks()
            if how == GRAPHED:
                graph_blocks(model, accumulates=False)
        elif how != "eager":
            model.compile(mode="reduce-overhead" if how == GRAPHED else None)
        return make_step(model)

    def measure(
        self, starts: Mapping[str, Callable[[], Step]], note: Note | None = None, only: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Prepare the contenders (`only` these, by name) one after the other and measure them in turns; the result.

        note: called with the result so far after each one; all that are ready are then measured again, so that all
        figures are of the same rounds.
        """
        began = time.monotonic()
        torch.compiler.reset()  # what was compiled before counts against torch's limit of variants
        longest = {"compiled": 0.0, "eager": 0.0}  # preparation so far
        for name, start in starts.items():
            if only is not None and name not in only:
                continue
            how = "eager" if name.endswith("eager") else "compiled"
            if time.monotonic() - began + longest[how] > self.options.seconds:
                self.result["left_out"][name] = f"{NO_TIME} of {self.options.seconds:.0f} s"
                continue
            try:
                self._ready[name] = self._prepare(start)
            except Exception as error:  # whatever a library, a compiler or the memory has against it
                self.result["left_out"][name] = first_line(error)
                continue
            longest[how] = max(longest[how], self._ready[name].preparation)
            if note is not None:
                self._take_turns()
                note(self.result)
        if note is None:
            self._take_turns()
        return self.result

    def _prepare(self, start: Callable[[], Step]) -> Contender:
        """Build it and take two steps to warm up (and compile), during which its memory is measured."""
        began = time.monotonic()
        before, held = start_memory(self.device), reserved_memory(self.device)
        step = start()
        step()
        if not torch.isfinite(step()).all():
            raise ArithmeticError("its second step gave values that are not finite")
        reserved = reserved_memory(self.device) - held if self.device.type == "cuda" else None
        return Contender(step, peak_memory(self.device) - before, reserved, time.monotonic() - began)

    def _take_turns(self) -> None:
        """Measure all that are ready and put their figures into the result."""
        measurements = {name: partial(self._turn, one.step) for name, one in self._ready.items()}
        turns = in_turns(measurements, self.options.rounds)
        times = {name: [took for took, _ in own] for name, own in turns.items()}
        peer = fastest(times, [name for name in times if name.startswith(PEERS)])
        contenders = figures(times, peer)
        for name, contender in self._ready.items():
            rate = self.options.batch / contenders[name]["median_ms"] * 1000
            shares = [share for _, share in turns[name]]
            contenders[name] |= {
                "images_per_second": rate,
                "utilization": rate * self.result["gflop_per_image"] / self.result["peak_tflops"] / 1e3,
                "shares": {part: statistics.median(share[part] for share in shares) for part in shares[0]},
                "peak_memory_mib": contender.memory / 2**20,
                "peak_reserved_mib": None if contender.reserved is None else contender.reserved / 2**20,
                "preparation_seconds": contender.preparation,
            }
        self.result |= {"contenders": contenders, "fastest_peer": peer}

    def _turn(self, step: Step) -> tuple[float, dict[str, float]]:
        """Seconds of a step, and the shares of its parts."""
        self.parts.shares()  # of the steps before
        took = seconds(step, 10 if self.device.type == "cuda" else 1, self.device)
        return took, self.parts.shares()

    def trace(self, file: Path) -> None:
        """Write a trace of one more step of each contender, which ui.perfetto.dev opens."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            for name, contender in self._ready.items():
                with record_function(name):
                    contender.step()
                    synchronize(self.device)
        profiler.export_chrome_trace(str(file))


def report_models(title: str, result: Mapping[str, Any], parts: Sequence[str] = ()) -> None:
    """Print what was compared, on what, and the figures; parts: of a step."""
    about = (
        "{title} of ViT-{preset}, batch {batch}, {precision}, on {device}; ratios to the fastest peer\n"
        "of peak: images/s x {gflop_per_image:.1f} GFLOP an image ({gflop_source}) / {peak_tflops:.2f} TFLOP/s "
        "({peak_source})"
    )
    columns = {
        "ms a step": "{median_ms:.1f}",
        "images/s": "{images_per_second:.1f}",
        "of peak": "{utilization:.1%}",
        **{part: f"{{shares[{part}]:.0%}}" for part in parts},
        "MiB": "{peak_memory_mib:.0f}",
        "MiB reserved": "{peak_reserved_mib:.0f}",
        "s to prepare": "{preparation_seconds:.0f}",
    }
    if all(one["peak_reserved_mib"] is None for one in result["contenders"].values()):
        del columns["MiB reserved"]
    report(about.format(title=title, **result), columns, result)
