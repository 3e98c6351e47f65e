"""The verb `plan`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscale.errors import ConfigError
from vitscale.planning.gpus import GPUS, gpu_of
from vitscale.run_folder import BAD_INPUT, DONE
from vitscale.text import above_zero, aligned, byte_size, duration

if TYPE_CHECKING:
    from vitscale.planning.recipe import SizesOfEncoder

_MODEL = """\
How: memory is counted on the model's own forward and backward, operation by operation, on tensors without content;
weights, gradients and optimizer by the layout of DDP and DeepSpeed 0.19. Time is the larger of what the GPU takes
(matrix products at 80% of the data sheet's rate, 3.2 passes over each byte that a step makes, 28 bytes a parameter for
AdamW) and of what the host takes (3.1 ms a block), and then the augmentation's: constants of one H200. A core decodes a
JPEG of 60 kB in 0.81 ms.
The GPU: {gpu_source}; its memory is what torch reports on such a card, as measured or computed.
The network: rings, at 80% of the slowest link's rate each way: {link_gb_s:g} GB/s from a GPU to the others of its node;
between nodes {network_gb_s:g} GB/s a node, which its GPUs share (--network; a DGX's adapters for SXM, 12.5 for cards on
PCIe). What runs beside a micro-batch's backward takes no time of its own; the last bucket does, which comes after the
backward, and so do the weights that ZeRO 1 and 2 gather at a step's end. No cluster has confirmed this part yet."""

_LEAST, _MOST, _MOST_IMAGES = 0.001, 1_000_000, 10**12


def register(verb: Callable[..., argparse.ArgumentParser], sizes_of_encoder: SizesOfEncoder) -> None:
    """Add the verb. sizes_of_encoder: the keys that fine-tuning takes from a config's model.init_from."""
    text = "memory, speed, hours and checkpoints of a run on GPUs that are not rented yet"
    added = verb("plan", partial(_plan, sizes_of_encoder=sizes_of_encoder), text)
    added.add_argument("config", metavar="CONFIG.yaml")
    text = "say train.micro_batch=128"
    added.add_argument("overrides", metavar="dotted.key=value", nargs="*", help=text)
    added.add_argument("--gpu", required=True, metavar="NAME", help=", ".join(GPUS))
    added.add_argument("--gpus", required=True, type=above_zero, metavar="N", help="in all")
    added.add_argument("--gpus-a-node", type=above_zero, default=8, metavar="N", help="(default: 8)")
    added.add_argument("--images", type=_images, metavar="N", help="in data.train, where the config says epochs")
    text = "of an image, compressed (default: 110, ImageNet's)"
    added.add_argument("--image-kb", type=_amount, default=110.0, metavar="KB", help=text)
    text = "GB/s of a node to the others, each way (default: of a DGX, 200 for A100, else 400; 12.5 for l40s and 4090)"
    added.add_argument("--network", type=_amount, metavar="GB/S", help=text)
    text = "what `vitscale bench step --json FILE` measured on such a GPU: steps are planned by its ratio to the plan"
    added.add_argument("--measured", type=Path, metavar="FILE", help=text)
    text = "GB/s of the file system for checkpoints, in all (default: 5)"
    added.add_argument("--disk", type=_amount, default=5.0, metavar="GB/S", help=text)
    added.add_argument("--price", type=_amount, metavar="X", help="of a GPU-hour, in any currency")
    text = "between two failures of the job (default: by the GPUs, as Llama 3's run had them)"
    added.add_argument("--failure-hours", type=_amount, metavar="H", help=text)
    added.add_argument("--json", action="store_true", help="print JSON alone")
    added.add_argument("--explain", action="store_true", help="also activations by part, and how it is estimated")


def _amount(text: str) -> float:
    """A number of the options' units, none of which any cluster has more or less of."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not _LEAST <= number <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number from {_LEAST} to {_MOST:,}")
    return number


def _images(text: str) -> int:
    number = above_zero(text)
    if number > _MOST_IMAGES:
        raise argparse.ArgumentTypeError(f"{text}: must be {_MOST_IMAGES:,} or less")
    return number


def _plan(arguments: argparse.Namespace, sizes_of_encoder: SizesOfEncoder) -> int:
    from vitscale.planning.measured import calibration
    from vitscale.planning.plan import Cluster, Planner, plan
    from vitscale.planning.recipe import planned_config

    if arguments.json and arguments.explain:
        raise ConfigError("--explain: is for people, and --json prints JSON alone; leave one out")
    config = planned_config(arguments.config, arguments.overrides, sizes_of_encoder)
    gpu = gpu_of(arguments.gpu)
    measured = None if arguments.measured is None else calibration(arguments.measured, config, gpu)
    if measured is not None:
        gpu = replace(gpu, step_ratio=measured["ratio"])
    cluster = Cluster(
        gpu, arguments.gpus, arguments.gpus_a_node, arguments.network, arguments.disk,
        arguments.price, arguments.failure_hours,
    )  # fmt: skip
    found = plan(Planner(config, cluster), arguments.images, arguments.image_kb) | {"measured": measured}
    print(json.dumps(found, indent=1) if arguments.json else as_text(found, arguments.explain))
    return DONE if found["fits"] else BAD_INPUT


def as_text(found: dict[str, Any], explain: bool = False) -> str:
    """A plan for people."""
    memory, parts = found["memory"], found["memory"]["activations_by_part"]
    counted = "  of the activations: " + ", ".join(f"{name} {byte_size(size)}" for name, size in parts.items())
    lines = [
        f"{found['gpus']} x {found['gpu']}, {found['nodes']} node(s){_network(found)}; {found['objective']}, "
        f"{found['parameters']:,} parameters{_trained(found)}, {_digits(found['flops_per_image'] / 1e9)} GFLOP to "
        "train on an image",
        f"{_asked(found['auto'])}: {_settings(found)}: "
        f"{byte_size(memory['total_bytes'])} of {byte_size(memory['of_bytes'])} a GPU, "
        + ("fits" if found["fits"] else "DOES NOT FIT"),
        aligned([[f"  {name}", byte_size(memory[name])] for name in _PARTS if memory[name]], right=(1,)),
        *([counted] if explain else []),
        *(f"not counted: {what}" for what in memory["not_counted"]),
        _step(found["step_seconds"]),
        *(f"not measured: {what}" for what in found["not_measured"]),
        *([_measured(found["measured"])] if found["measured"] else []),
        *([_offload(found)] if found["offload"] else []),
        f"speed: {found['images_per_second']:,.0f} images/s, {found['mfu']:.0%} of the GPUs' matrix rate",
        _fastest(found["fastest"]),
        _run(found["run"]),
        _loader(found["loader"]),
        _checkpoints(found["checkpoint"]),
        _scaling(found["scaling"]),
    ]
    return "\n".join([*lines, _MODEL.format(**found)] if explain else lines)


_PARTS = (
    "weights", "masters", "gradients", "moments", "ema", "buckets", "activations", "inputs", "slack"
)  # fmt: skip


def _asked(auto: list[str]) -> str:
    return f"{' and '.join(auto)} would be" if auto else "as configured"


def _settings(of: dict[str, Any]) -> str:
    kind = of["gradient_checkpointing"]
    again = f", {'selective ' if kind == 'selective' else ''}gradient checkpointing" if kind else ""
    return f"ZeRO {of['zero_stage']}, micro-batch {of['micro_batch']} x {of['accumulation']}{again}"


def _step(step: dict[str, Any]) -> str:
    return (
        f"step: {step['total']:.3f} s, bound by {step['bound_by']}: matrix products {step['matrix']:.3f}, moving "
        f"activations {step['traffic']:.3f}, optimizer {step['optimizer']:.3f}; beside them the host "
        f"{step['host']:.3f}; then augmentation {step['augment']:.3f}, communication {step['communication']:.3f} "
        f"({step['exposed']:.3f} not hidden)"
    )


def _network(found: dict[str, Any]) -> str:
    return f" with {found['network_gb_s']:g} GB/s each, either way" if found["nodes"] > 1 else ""


def _measured(by: dict[str, Any]) -> str:
    return (
        f"calibrated by {by['file']}: {by['row']}, {by['objective']}, ViT-{by['preset']}, batch {by['batch']}, "
        f"{by['precision']}, on {by['device']}: {by['seconds'] * 1e3:.1f} ms where {by['planned'] * 1e3:.1f} were "
        f"planned: the GPU's and the host's part of a step times {by['ratio']:.3g}"
    )


def _trained(found: dict[str, Any]) -> str:
    count = found["trained_parameters"]
    return "" if count == found["parameters"] else f" ({count:,} trained)"


def _offload(found: dict[str, Any]) -> str:
    host, step = found["offload"], found["step_seconds"]
    return (
        f"offloaded optimizer: {step['offload']:.3f} s of the step (reckoned, not measured: AdamW at 50 GB/s of the "
        f"host's memory a rank, and PCIe), {byte_size(host['host_bytes_a_rank'])} of the host's memory a rank, "
        f"{byte_size(host['host_bytes_a_node'])} a node"
    )


def _fastest(best: dict[str, Any] | None) -> str:
    if best is None:
        return "nothing fits, not with ZeRO 3 and gradient checkpointing: larger GPUs, or parallel.offload_optimizer"
    largest = f"the largest micro-batch that fits so: {best['largest_micro_batch']}"
    if best["is_this"]:
        return f"this is as fast as any that fits, to 2%; {largest}"
    rate, size = f"{best['images_per_second']:,.0f} images/s", byte_size(best["total_bytes"])
    times = f"{best['micro_batch']} x {best['accumulation']} a step"
    return f"fastest that fits: {best['keys']} ({times}): {rate}, {size} a GPU; {largest}"


def _loader(loader: dict[str, Any]) -> str:
    cores, rate = (loader[f"{name}_a_node"] for name in ("cores", "bytes_per_second"))
    megabytes = "below 1" if rate < 1e6 else f"{rate / 1e6:,.0f}"
    needed = "below 1 core" if cores < 1 else f"{cores:.1f} cores" if cores < 10 else f"{cores:.0f} cores"
    return f"loader: {needed} and {megabytes} MB/s a node"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _checkpoints(save: dict[str, Any]) -> str:
    return (
        f"checkpoints: {byte_size(save['bytes'])}, {save['save_seconds']:.1f} s each; a failure every "
        f"{save['hours_between_failures']:,.0f} h costs {save['seconds_lost_a_failure']:,.0f} s by the config's "
        f"interval of {save['config_every_seconds']:,.0f} s; best: checkpoint.every_steps={save['every_steps']} "
        f"({save['most_available_seconds']:,.0f} s; by Young and Daly {save['young_daly_seconds']:,.0f} s)"
    )


def _scaling(points: list[dict[str, Any]]) -> str:
    """By number of GPUs; why the first is refused that the config's own rules refuse."""
    speeds = ", ".join(f"{each['gpus']}: {_speed(each)}" for each in points)
    line = f"this global batch by GPUs, images/s (by the fastest micro-batch that fits): {speeds}"
    refusals = [each["refused"] for each in points if each["refused"]]
    return "\n  refused: ".join([line, *refusals[:1]])


def _speed(point: dict[str, Any]) -> str:
    if point["images_per_second"] is None:
        return "refused" if point["refused"] else "does not fit"
    return f"{point['images_per_second']:,.0f} ({point['micro_batch']})"


def _run(run: dict[str, Any]) -> str:
    if run["steps"] is None:
        return f"run: {run['missing']}"
    cost = "" if run["cost"] is None else f", {run['cost']:,.0f} at the price given"
    return f"run: {run['steps']:,} steps, {duration(run['hours'] * 3600)}, {run['gpu_hours']:,.0f} GPU-hours{cost}"
