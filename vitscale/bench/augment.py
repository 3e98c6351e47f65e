"""`vitscale bench augment`: a preset's augmentation beside torchvision v2, an image and a batch at a time.

All begin with the same decoded photographs on the host and end with normalized images on the device. A batch at a
time torchvision gives every image the same random numbers. Its RandAugment is bilinear, always applies what it has
chosen and has no deviation of the magnitude; ours is timm's.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitscale import rng
from vitscale.augment.pipeline import Augment
from vitscale.bench.measuring import device_name, device_of, seconds
from vitscale.bench.photographs import SIZE, photograph
from vitscale.bench.rounds import benchmark_parser, fastest, figures, first_line, in_turns, report
from vitscale.config import augmentation
from vitscale.config.augmentation import Augmentation
from vitscale.data.crop import training_crop
from vitscale.inference.command import above_zero

OURS = "vitscale, a batch at a time"
CLASSES = 1000
Step = Callable[[], Any]


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    result = measure(arguments)
    title = (
        "augment.preset={preset}: {batch} photographs of {photographs} to {size}x{size}, on {device_name}\n"
        "median of {rounds} rounds, ratios to {fastest_peer}"
    )
    columns = {"ms/batch": "{median_ms:.1f}", "images/s": "{images_per_second:.0f}"}
    report(title.format(**result), columns, result)
    return 0


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """What `main` prints as JSON."""
    parser = benchmark_parser("augment", __doc__)
    presets = tuple(augmentation.PRESETS)
    parser.add_argument("--preset", choices=presets, default="randaug", help="of augment.preset (default: randaug)")
    parser.add_argument("--batch", type=above_zero, default=64, help="images, an even number (default: %(default)s)")
    parser.add_argument("--size", type=above_zero, default=224, help="pixels a side (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: the GPU where there is one")
    options = parser.parse_args(arguments)
    device = device_of(options.device)
    section = Augmentation(preset=options.preset, **augmentation.PRESETS[options.preset])
    photographs = [np.array(Image.open(io.BytesIO(photograph(seed)))) for seed in range(options.batch)]
    labels = torch.arange(options.batch) % CLASSES
    steps, left_out = {OURS: _ours(section, photographs, labels, options.size, device)}, {}
    for many in ("an image", "a batch"):
        name = f"torchvision v2, {many} at a time"
        try:
            step = _torchvision(section, photographs, labels, options.size, device, many == "a batch")
            step()
            steps[name] = step
        except Exception as error:  # of a torchvision that is not there, or broken
            left_out[name] = first_line(error)
    taken = in_turns({name: partial(seconds, step, 1, device) for name, step in steps.items()}, 1 + options.rounds)
    times = {name: own[1:] for name, own in taken.items()}  # without the first, which makes what the others reuse
    peer = fastest(times, [name for name in times if name != OURS])
    contenders = figures(times, peer)
    for figure in contenders.values():
        figure["images_per_second"] = 1000 * options.batch / figure["median_ms"]
    return {
        "bench": "augment", **vars(options), "photographs": f"{SIZE[1]}x{SIZE[0]}", "device_name": device_name(device),
        "contenders": contenders, "fastest_peer": peer, "left_out": left_out,
    }  # fmt: skip


def _ours(
    section: Augmentation, photographs: Sequence[np.ndarray], labels: Tensor, size: int, device: torch.device
) -> Step:
    heights, widths = (np.array([image.shape[axis] for image in photographs], dtype=np.int32) for axis in (0, 1))
    ends = np.cumsum([image.size for image in photographs])
    pixels = np.concatenate([image.reshape(-1) for image in photographs])
    crop = training_crop(section, (size, size))
    mixes = bool(section.mixup or section.cutmix)
    augment = Augment(section, (size, size), 3, str(device), train=True, labels=mixes, num_labels=CLASSES)
    epochs = iter(range(1 << 30))

    def step() -> Any:
        keys = rng.sample_key(0, next(epochs), np.arange(len(photographs), dtype=np.int64))
        batch = SimpleNamespace(
            pixels=pixels, offsets=ends - heights.astype(np.int64) * widths * 3, heights=heights, widths=widths,
            channels=3, boxes=crop.boxes(keys, heights, widths).astype(np.float32), labels=labels.numpy(),
            sample_keys=keys,
        )  # fmt: skip
        return augment(batch)

    return step


def _torchvision(
    section: Augmentation, photographs: Sequence[np.ndarray], labels: Tensor, size: int, device: torch.device,
    by_batch: bool,
) -> Step:  # fmt: skip
    v2 = importlib.import_module("torchvision.transforms.v2")
    transform, mix = _transforms(section, size, v2)
    images = torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2)

    def one(image: Tensor) -> Tensor:
        return transform(image.to(device, non_blocking=True))

    if by_batch:
        return lambda: mix(one(images), labels.to(device))
    return lambda: mix(torch.stack([one(image) for image in images]), labels.to(device))


def _transforms(
    section: Augmentation, size: int, v2: ModuleType
) -> tuple[Callable[[Tensor], Tensor], Callable[..., Any]]:
    """The section as torchvision's transforms: of images, and of a batch with its labels."""
    crop = v2.RandomResizedCrop(
        size, section.crop_scale, section.crop_ratio, v2.InterpolationMode.BICUBIC, antialias=True
    )
    transforms = [crop, v2.RandomHorizontalFlip(section.flip), *_random_transforms(section, v2)]
    transforms += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(section.mean, section.std)]
    transforms += [v2.RandomErasing(section.erase, value=0)] if section.erase else []
    mixes = [v2.MixUp(alpha=section.mixup, num_classes=CLASSES)] if section.mixup else []
    mixes += [v2.CutMix(alpha=section.cutmix, num_classes=CLASSES)] if section.cutmix else []
    return v2.Compose(transforms), v2.RandomChoice(mixes) if mixes else lambda images, labels: (images, labels)


def _random_transforms(section: Augmentation, v2: ModuleType) -> list[Any]:
    transforms: list[Any] = []
    if section.rand_augment is not None:
        policy = augmentation.parse_rand_augment(section.rand_augment)
        magnitude = round(3 * policy.magnitude)  # of 30 there, of 10 here
        transforms.append(v2.RandAugment(policy.layers, magnitude, interpolation=v2.InterpolationMode.BILINEAR))
    if section.three_augment:
        blurred = v2.GaussianBlur(13, (0.1, 2.0))
        transforms.append(v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(128, p=1.0), blurred]))
    if any(section.color_jitter):
        transforms.append(v2.ColorJitter(*section.color_jitter))
    return transforms
