"""Stage d: `vitscale bench step` at the sizes that a GPU is for, MAE and classification."""

from __future__ import annotations

from functools import partial

from vitscale.bench import step
from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting

BATCHES = {"L": 128, "B": 256, "H": 64}  # images a step
_SHARE = 0.8  # of a case's time for contenders; the rest is for what began to compile just before it was over


def cases(setting: Setting) -> Cases:
    sizes = {"Ti": 1} if setting.tiny else BATCHES
    asked = [(objective, preset) for preset in sizes for objective in ("mae", "classification")]
    left = [pair for pair in asked if _name(*pair) not in setting.settled]
    return {
        _name(objective, preset): partial(_step, objective, preset, sizes[preset], place, len(left), setting)
        for place, (objective, preset) in enumerate([*left, *(pair for pair in asked if pair not in left)])
    }


def _name(objective: str, preset: str) -> str:
    return f"{objective} {preset}"


def _step(objective: str, preset: str, batch: int, place: int, of: int, setting: Setting) -> Figures:
    """One comparison, in its part of the time that is left."""
    seconds = setting.seconds_left() / max(of - place, 1) * _SHARE
    asked = ["--objective", objective, "--preset", preset, "--batch", str(batch), "--precision", "bf16",
             "--device", setting.device, "--seconds", f"{seconds:.0f}"]  # fmt: skip
    measured = setting.earlier.get("a", {}).get("matrix")
    if measured is not None:
        asked += ["--peak", str(measured["tflops"])]
    if setting.tiny:
        asked += ["--rounds", "1"]
    result = step.measure(asked, note=lambda so_far: setting.note(_with_text(so_far)))
    if not any(name.startswith(step.OURS) for name in result["contenders"]):
        raise Mismatch(f"no model of ours could be measured: {result['left_out']}")
    return _with_text(result)


def _with_text(result: Figures) -> Figures:
    told = [
        f"{name} {measured['images_per_second']:.1f} ({measured['utilization']:.0%})"
        for name, measured in result["contenders"].items()
    ]
    ratios = [measured["ratio"] for name, measured in result["contenders"].items() if name.startswith(step.OURS)]
    if ratios and ratios[0] is not None:
        told.append(f"ratio {max(ratios):.2f}")
    left = ", ".join(f"{name} ({reason[:60]})" for name, reason in result["left_out"].items())
    return {**result, "text": "images/s: " + ", ".join(told) + (f"; left out: {left}" if left else "")}
