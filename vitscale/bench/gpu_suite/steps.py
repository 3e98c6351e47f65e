"""Stage d: `vitscale bench step` at the sizes that a GPU is for, MAE and classification."""

from __future__ import annotations

from functools import partial

from vitscale.bench import step
from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting, Unfinished
from vitscale.bench.peers import GRAPHED, NO_TIME, OURS

BATCHES = {"B": 256, "L": 128, "H": 64}  # images a step; the rehearsal's Ti takes one
OBJECTIVES = ("mae", "classification")
COMPILED = f"{OURS} compiled"
FIRST = (COMPILED, "transformers eager", f"{OURS} {GRAPHED}")  # quickly there
_SHARE = 0.8  # of the time for beginning with contenders; the last one may compile for longer than those before it


def cases(setting: Setting) -> Cases:
    """Size by size, the first contenders and then each compiled peer beside ours, a case each, since compiling a peer
    takes minutes; in the end the peers by CUDA graphs."""
    if setting.tiny:
        some = (f"{OURS} eager", "transformers eager")
        return {"mae Ti": partial(_step, "mae", "Ti", some, setting),
                "classification Ti": partial(_step, "classification", "Ti", None, setting)}  # fmt: skip
    peers = ("transformers", "timm")  # of more worth first
    beside = {"": FIRST} | {f", {peer} compiled": (COMPILED, f"{peer} compiled") for peer in peers}
    graphed = {f", {peer} {GRAPHED}": (*FIRST[::2], f"{peer} {GRAPHED}") for peer in peers}
    return {
        f"{objective} {preset}{suffix}": partial(_step, objective, preset, only, setting)
        for groups in (beside, graphed)
        for preset in BATCHES
        for suffix, only in groups.items()
        for objective in OBJECTIVES
    }


def _step(objective: str, preset: str, only: tuple[str, ...] | None, setting: Setting) -> Figures:
    seconds = setting.seconds_left() * _SHARE
    arguments = ["--objective", objective, "--preset", preset, "--batch", str(BATCHES.get(preset, 1)),
                 "--precision", "bf16", "--device", setting.device, "--seconds", f"{seconds:.0f}"]  # fmt: skip
    if setting.measured_tflops is not None:
        arguments += ["--peak", str(setting.measured_tflops)]
    if setting.tiny:
        arguments += ["--rounds", "1"]
    result = step.measure(arguments, note=lambda so_far: setting.note(_with_text(so_far)), only=only)
    late = [name for name, reason in result["left_out"].items() if reason.startswith(NO_TIME)]
    if late:
        raise Unfinished(f"{NO_TIME} for {', '.join(late)}")
    if not any(name.startswith(OURS) for name in result["contenders"]):
        raise Mismatch(f"no model of ours could be measured: {result['left_out']}")
    return _with_text(result)


def _with_text(result: Figures) -> Figures:
    contenders = result["contenders"]
    parts = [f"{name} {one['images_per_second']:.1f} ({one['utilization']:.0%})" for name, one in contenders.items()]
    ours = {name: one["ratio"] for name, one in contenders.items() if name.startswith(OURS) and one["ratio"]}
    graphed = ours.pop(f"{OURS} {GRAPHED}", None)  # apart: the first peers have no graphs
    parts += [f"ratio {max(ours.values()):.2f}"] if ours else []
    parts += [] if graphed is None else [f"{GRAPHED} {graphed:.2f}"]
    left_out = ", ".join(f"{name} ({reason[:60]})" for name, reason in result["left_out"].items())
    return {**result, "text": "images/s: " + ", ".join(parts) + (f"; left out: {left_out}" if left_out else "")}
