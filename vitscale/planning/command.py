"""The verb `plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from vitscale.errors import ConfigError
from vitscale.run_folder import BAD_INPUT, DONE
from vitscale.text import above_zero, aligned, byte_size, duration

_MODEL = """\
How: memory is counted on the model's own forward and backward, operation by operation, on tensors without content;
weights, gradients and optimizer by the layout of DDP and DeepSpeed 0.19. Time is the larger of what the GPU takes
(matrix products at 80% of the data sheet's rate, 3.2 passes over each byte that a step makes, 28 bytes a parameter for
AdamW) and of what the host takes (3.1 ms a block): constants of one H200. What a micro-batch's backward hides of
communication is not counted (the last bucket is, and the weights that ZeRO 1 and 2 gather at a step's end); no cluster
has confirmed that part yet. A core decodes a JPEG of 60 kB in 0.81 ms."""


def register(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb."""
    added = verb("plan", _plan, "memory, speed, hours and checkpoints of a run on GPUs that are not rented yet")
    added.add_argument("config", metavar="CONFIG.yaml")
    text = "say train.micro_batch=128"
    added.add_argument("overrides", metavar="dotted.key=value", nargs="*", help=text)
    added.add_argument("--gpu", required=True, metavar="NAME", help="a100, h100, h200, b200, l40s or 4090")
    added.add_argument("--gpus", required=True, type=above_zero, metavar="N", help="in all")
    added.add_argument("--gpus-a-node", type=above_zero, default=8, metavar="N", help="(default: 8)")
    added.add_argument("--images", type=above_zero, metavar="N", help="of the data set, where the config says epochs")
    text = "of an image, compressed (default: 110, ImageNet's)"
    added.add_argument("--image-kb", type=_amount, default=110.0, metavar="KB", help=text)
    text = "GB/s of a node to the others, each way (default: 400, eight adapters of 400 Gb/s)"
    added.add_argument("--network", type=_amount, default=400.0, metavar="GB/S", help=text)
    text = "GB/s of the file system for checkpoints, in all (default: 5)"
    added.add_argument("--disk", type=_amount, default=5.0, metavar="GB/S", help=text)
    added.add_argument("--price", type=_amount, metavar="X", help="of a GPU-hour, in any currency")
    text = "between two failures of the job (default: by the GPUs, as Llama 3's run had them)"
    added.add_argument("--failure-hours", type=_amount, metavar="H", help=text)
    added.add_argument("--json", action="store_true", help="print JSON alone")
    added.add_argument("--explain", action="store_true", help="also activations by part, and how it is estimated")


def _amount(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be above 0")
    return number


def _plan(arguments: argparse.Namespace) -> int:
    from vitscale.config.load import load_config
    from vitscale.planning.gpus import gpu_of
    from vitscale.planning.plan import Cluster, Planner, plan

    if arguments.json and arguments.explain:
        raise ConfigError("--explain: is for people, and --json prints JSON alone; leave one out")
    cluster = Cluster(
        gpu_of(arguments.gpu), arguments.gpus, arguments.gpus_a_node, arguments.network, arguments.disk,
        arguments.price, arguments.failure_hours,
    )  # fmt: skip
    planner = Planner(load_config(arguments.config, arguments.overrides), cluster)
    found = plan(planner, arguments.images, arguments.image_kb)
    print(json.dumps(found, indent=1) if arguments.json else as_text(found, arguments.explain))
    return DONE if found["fits"] else BAD_INPUT


def as_text(found: dict[str, Any], explain: bool = False) -> str:
    """A plan for people."""
    memory, parts = found["memory"], found["memory"]["activations_by_part"]
    counted = "  of the activations: " + ", ".join(f"{name} {byte_size(size)}" for name, size in parts.items())
    lines = [
        f"{found['gpus']} x {found['gpu']}, {found['nodes']} node(s); {found['parameters']:,} parameters"
        f"{_trained(found)}, {found['flops_per_image'] / 1e9:,.3g} GFLOP to train on an image",
        f"{_asked(found['auto'])}: {_settings(found)}: "
        f"{byte_size(memory['total_bytes'])} of {byte_size(memory['of_bytes'])} a GPU, "
        + ("fits" if found["fits"] else "DOES NOT FIT"),
        aligned([[f"  {name}", byte_size(memory[name])] for name in _PARTS if memory[name]], right=(1,)),
        *([counted] if explain else []),
        _step(found["step_seconds"]),
        *([_offload(found)] if found["offload"] else []),
        f"speed: {found['images_per_second']:,.0f} images/s, {found['mfu']:.0%} of the GPUs' matrix rate",
        _fastest(found["fastest"]),
        _run(found["run"]),
        f"loader: {found['loader']['cores_a_node']:.0f} cores and "
        f"{found['loader']['bytes_per_second_a_node'] / 1e6:,.0f} MB/s a node",
        _checkpoints(found["checkpoint"]),
        _scaling(found["scaling"]),
    ]
    return "\n".join([*lines, _MODEL] if explain else lines)


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
        f"{step['host']:.3f}, communication {step['communication']:.3f} ({step['exposed']:.3f} not hidden)"
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
    rate, size = f"{best['images_per_second']:,.0f} images/s", byte_size(best["total_bytes"])
    return f"fastest that fits: {best['keys']}: {rate}, {size} a GPU"


def _checkpoints(save: dict[str, Any]) -> str:
    return (
        f"checkpoints: {byte_size(save['bytes'])}, {save['save_seconds']:.1f} s each; a failure every "
        f"{save['hours_between_failures']:,.0f} h costs {save['seconds_lost_a_failure']:,.0f} s by the config's "
        f"interval of {save['config_every_seconds']:,.0f} s; best: checkpoint.every_steps={save['every_steps']} "
        f"({save['most_available_seconds']:,.0f} s; by Young and Daly {save['young_daly_seconds']:,.0f} s)"
    )


def _scaling(points: list[dict[str, Any]]) -> str:
    speeds = ", ".join(f"{each['gpus']}: {each['images_per_second']:,.0f}" for each in points)
    return f"this global batch by GPUs, images/s: {speeds or 'no number of whole nodes divides it'}"


def _run(run: dict[str, Any]) -> str:
    if run["steps"] is None:
        return "run: give --images N, the size of the data set, since the config says epochs"
    cost = "" if run["cost"] is None else f", {run['cost']:,.0f} at the price given"
    return f"run: {run['steps']:,} steps, {duration(run['hours'] * 3600)}, {run['gpu_hours']:,.0f} GPU-hours{cost}"
