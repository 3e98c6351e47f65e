"""Stage f: the augmentation of photographs on the device.

Crop, flip and resize: the CPU's values, and how long a batch takes; the presets with more: beside torchvision v2.
"""

from __future__ import annotations

from functools import partial

import torch

from vitscale.augment.pipeline import Augment
from vitscale.bench.augment import measure
from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting
from vitscale.bench.measuring import median_seconds
from vitscale.bench.photographs import open_loader
from vitscale.config.schema import RunConfig, Train

# Of 255, at most, of any value: in fp32, and with TF32's products of 10 bits, which training in bf16 allows.
TOLERANCES = {"highest": 0.01, "high": 0.75}


def cases(setting: Setting) -> Cases:
    compared = {f"matrix products {precision}": partial(_compare, precision, setting) for precision in TOLERANCES}
    return compared | {f"preset {name}": partial(_beside_torchvision, name, setting) for name in ("deit3", "randaug")}


def _beside_torchvision(preset: str, setting: Setting) -> Figures:
    batch, size, rounds = (4, 32, 1) if setting.tiny else (256, 224, 5)
    sizes = ["--batch", str(batch), "--size", str(size), "--rounds", str(rounds)]
    result = measure(["--preset", preset, "--device", torch.device(setting.device).type, *sizes])
    rates = {name: figure["images_per_second"] for name, figure in result["contenders"].items()}
    left_out = [f"{name} left out: {reason}" for name, reason in result["left_out"].items()]
    text = "; ".join([f"{name}: {rate:.0f} images/s" for name, rate in rates.items()] + left_out)
    return {**result, "text": text}


def _compare(precision: str, setting: Setting) -> Figures:
    count = 16 if setting.tiny else 256
    config, device = RunConfig(train=Train(global_batch=count, micro_batch=count)), torch.device(setting.device)
    std = torch.tensor(config.augment.std).view(-1, 1, 1)
    torch.set_float32_matmul_precision(precision)
    with open_loader(setting.photographs(), config) as loader:
        batch = next(loader)
        on_cpu, on_device = (Augment.of(config, kind, train=True) for kind in ("cpu", device.type))
        difference = (on_device(batch).pixel_values.cpu() - on_cpu(batch).pixel_values) * std * 255
        seconds = median_seconds(lambda: on_device(batch), device)
    figures: Figures = {
        "largest_difference": float(difference.abs().max()),
        "mean_difference": float(difference.abs().mean()),
        "batch": count,
        "batch_seconds": seconds,
        "images_per_second": count / seconds,
    }
    if not figures["largest_difference"] <= TOLERANCES[precision]:
        raise Mismatch(f"values up to {figures['largest_difference']:.3g} of 255 off the CPU's (at most "
                       f"{TOLERANCES[precision]})")  # fmt: skip
    figures["text"] = (f"at most {figures['largest_difference']:.2g} of 255 off the CPU's; {seconds * 1000:.1f} ms a "
                       f"batch of {count}, {count / seconds:.0f} images/s")  # fmt: skip
    return figures
