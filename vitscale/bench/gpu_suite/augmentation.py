"""Stage f: the augmentation of photographs on the device.

Crop, flip and resize: the CPU's values, and how long a batch takes; the presets with more: beside torchvision v2.
"""

from __future__ import annotations

from functools import partial

import torch

from vitscale.augment.feed import DeviceFeed
from vitscale.augment.pipeline import Augment
from vitscale.bench.augment import measure
from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting
from vitscale.bench.measuring import median_seconds, synchronize
from vitscale.bench.photographs import open_loader
from vitscale.config.schema import RunConfig, Train
from vitscale.data.loader import Loader

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
        loader.release(batch)
        fed_seconds = _as_fed(loader, on_device, device)
    figures: Figures = {
        "largest_difference": float(difference.abs().max()),
        "mean_difference": float(difference.abs().mean()),
        "batch": count,
        "batch_seconds": seconds,
        "fed_seconds": fed_seconds,
        "images_per_second": count / seconds,
    }
    if not figures["largest_difference"] <= TOLERANCES[precision]:
        raise Mismatch(f"values up to {figures['largest_difference']:.3g} of 255 off the CPU's (at most "
                       f"{TOLERANCES[precision]})")  # fmt: skip
    figures["text"] = (f"at most {figures['largest_difference']:.2g} of 255 off the CPU's; {seconds * 1000:.1f} ms a "
                       f"batch of {count}, {count / seconds:.0f} images/s; {fed_seconds * 1000:.1f} ms as a run feeds "
                       "it, from pinned memory")  # fmt: skip
    return figures


def _as_fed(loader: Loader, augment: Augment, device: torch.device, batches: int = 4) -> float:
    """Seconds of the feed's stream a batch, its copy from pinned memory included."""
    with DeviceFeed(loader, augment, device) as feed:
        for _ in range(loader.memories):  # each is pinned when it comes first
            next(feed)
        synchronize(device)
        feed.read_seconds()
        for _ in range(batches):
            next(feed)
        synchronize(device)
        return feed.read_seconds()["augment"] / batches
