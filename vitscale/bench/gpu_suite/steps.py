"""Stage d: `vitscale bench step` at the sizes that a GPU is for, MAE and classification."""

from __future__ import annotations

from functools import partial

from vitscale.bench import step
from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting

BATCHES = {"L": 128, "B": 256, "H": 64}  # images a step
OBJECTIVES = ("mae", "classification")
FIRST = 2  # contenders: ours compiled, transformers eager
_SHARE = 0.8  # of the time for beginning with contenders; the last one may compile for longer than those before it


def cases(setting: Setting) -> Cases:
    """The first contenders at every size, then at every size all: compiling peers takes minutes."""
    if setting.tiny:
        return {"mae Ti": partial(_step, "mae", "Ti", 1, FIRST, setting),
                "classification Ti, all": partial(_step, "classification", "Ti", 1, None, setting)}  # fmt: skip
    return {
        f"{objective} {preset}{', all' if most is None else ''}": partial(
            _step, objective, preset, batch, most, setting
        )
        for most in (FIRST, None)
        for preset, batch in BATCHES.items()
        for objective in OBJECTIVES
    }


def _step(objective: str, preset: str, batch: int, most: int | None, setting: Setting) -> Figures:
    seconds = setting.seconds_left() * _SHARE
    asked = ["--objective", objective, "--preset", preset, "--batch", str(batch), "--precision", "bf16",
             "--device", setting.device, "--seconds", f"{seconds:.0f}"]  # fmt: skip
    measured = setting.earlier.get("a", {}).get("matrix")
    if measured is not None:
        asked += ["--peak", str(measured["tflops"])]
    if setting.tiny:
        asked += ["--rounds", "1"]
    result = step.measure(asked, note=lambda so_far: setting.note(_with_text(so_far)), most=most)
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
