"""What an export or a change of a model did to it: size, latency, and how far its answers are from fp32's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.text import aligned

Runner = Callable[[Tensor], tuple[Tensor, ...]]  # pixels [n, channels, height, width] -> outputs, each [n, ...]
Labelled = tuple[Tensor, Tensor | None]  # pixels, and int64 labels [n] where they are known

SAME = 1e-3  # of the largest output: float32 in another order of summation stays far below it
LATENCY_SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 3.0, 50, 5


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared."""

    name: str
    run: Runner
    bytes: int  # on disk
    is_exact: bool = False  # it must give the answers of the variant before it, but for rounding


@dataclass
class Agreement:
    """How far a variant's answers are from those of the first."""

    images: int = 0
    same_top1: int = 0
    max_difference: float = 0.0
    labelled: int = 0
    correct: int = 0

    def add(self, outputs: tuple[Tensor, ...], reference: tuple[Tensor, ...], labels: Tensor | None) -> None:
        self.images += len(outputs[0])
        self.max_difference = max(self.max_difference, difference(outputs, reference))
        if outputs[0].ndim == 2:
            answers = outputs[0].argmax(-1)
            self.same_top1 += int((answers == reference[0].argmax(-1)).sum())
            if labels is not None:
                self.labelled += len(labels)
                self.correct += int((answers == labels).sum())


def difference(outputs: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
    """The largest one between any two numbers."""
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(outputs, reference, strict=True))


def compare(variants: Sequence[Variant], batches: Iterable[Labelled]) -> list[Agreement]:
    """Run every variant on every batch. The first is what the others are held against.

    CheckpointError where a variant gives no numbers, or an exact one others than the variant before it.
    """
    agreements = [Agreement() for _ in variants]
    for pixels, labels in batches:
        outputs = [variant.run(pixels) for variant in variants]
        for place, (variant, own) in enumerate(zip(variants, outputs, strict=True)):
            if not all(bool(torch.isfinite(output).all()) for output in own):
                raise CheckpointError(f"{variant.name}: gives NaN or infinity; nothing was kept")
            if variant.is_exact:
                _require_same(variant, own, variants[place - 1].name, outputs[place - 1])
            agreements[place].add(own, outputs[0], labels)
    return agreements


def _require_same(variant: Variant, own: tuple[Tensor, ...], name: str, reference: tuple[Tensor, ...]) -> None:
    largest = max(float(output.abs().max()) for output in reference)
    found, most = difference(own, reference), SAME * max(1.0, largest)
    if found > most:
        shape = tuple(own[0].shape)
        raise CheckpointError(
            f"{variant.name}: differs from {name} by {found:.3g} on outputs {shape}, more than {most:.3g}, which is "
            "not rounding; nothing was kept. Try other versions of torch, onnx and onnxscript, or the other --format"
        )


def latencies(runs: Sequence[Runner], pixels: Tensor) -> tuple[list[float], int]:
    """The median milliseconds of each run on `pixels`, taken in turns, and how many turns there were."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(pixels)
    start = time.perf_counter()
    for rounds in range(1, MOST_ROUNDS + 1):
        for run, own in zip(runs, times, strict=True):
            before = time.perf_counter()
            run(pixels)
            own.append(1000 * (time.perf_counter() - before))
        if rounds >= LEAST_ROUNDS and time.perf_counter() - start > LATENCY_SECONDS * len(runs):
            break
    return [median(own) for own in times], rounds


def as_table(
    variants: Sequence[Variant], agreements: Sequence[Agreement], milliseconds: Sequence[float], has_classes: bool
) -> str:
    """A line a variant; the first is what the others are held against."""
    columns = [
        ["", *(variant.name for variant in variants)],
        ["MB", *(f"{variant.bytes / 1e6:.2f}" for variant in variants)],
        ["ms/image", *(f"{taken:.2f}" for taken in milliseconds)],
    ]
    others = agreements[1:]
    if has_classes:
        columns.append(["top-1 agreement", "", *(f"{100 * each.same_top1 / each.images:.2f} %" for each in others)])
    columns.append(["max difference", "", *(f"{each.max_difference:.2g}" for each in others)])
    if any(each.labelled for each in agreements):
        columns.append(["accuracy", *(f"{100 * each.correct / each.labelled:.2f} %" for each in agreements)])
    return aligned(list(zip(*columns, strict=True)), right=range(1, len(columns)))
