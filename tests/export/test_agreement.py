"""Size, latency and agreement: counted right, and what must be the same is held to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.export.agreement import LEAST_ROUNDS, Agreement, Variant, as_table, compare, latencies

BATCHES = [
    (torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0]]), torch.tensor([0, 1, 1])),
    (torch.tensor([[1.0, 0.9]]), torch.tensor([0])),
]


def same(pixels: Tensor) -> tuple[Tensor, ...]:
    return (pixels,)


def shifted(pixels: Tensor) -> tuple[Tensor, ...]:
    return (pixels + torch.tensor([0.0, 0.5]),)


def test_agreement_is_counted_over_all_batches() -> None:
    first, second = compare([Variant("fp32", same, 1), Variant("other", shifted, 1)], BATCHES)
    assert first == Agreement(images=4, same_top1=4, max_difference=0.0, labelled=4, correct=3)
    assert second == Agreement(images=4, same_top1=3, max_difference=0.5, labelled=4, correct=2)
    unlabelled, _ = compare([Variant("fp32", same, 1), Variant("other", shifted, 1)], [(BATCHES[0][0], None)])
    assert (unlabelled.images, unlabelled.labelled) == (3, 0)


def test_the_largest_difference_of_any_output() -> None:
    def pair(pixels: Tensor) -> tuple[Tensor, ...]:
        return pixels, pixels[:, None] * 2

    def other(pixels: Tensor) -> tuple[Tensor, ...]:
        return pixels, pixels[:, None] * 2 - 3

    assert compare([Variant("fp32", pair, 1), Variant("other", other, 1)], BATCHES)[1].max_difference == 3


def test_what_must_be_the_same_is() -> None:
    def rounded(pixels: Tensor) -> tuple[Tensor, ...]:
        return (pixels * (1 + 1e-6),)

    chain = [Variant("fp32", same, 1), Variant("pruned", shifted, 1)]
    fine = Variant("onnx", lambda pixels: (shifted(pixels)[0] * (1 + 1e-6),), 1, is_exact=True)
    assert compare([*chain, fine], BATCHES)[2].max_difference == pytest.approx(0.5, abs=1e-5)
    compare([chain[0], Variant("onnx", rounded, 1, is_exact=True)], BATCHES)
    with pytest.raises(CheckpointError, match=r"onnx: differs from pruned by 0\.5.*nothing was kept"):
        compare([*chain, Variant("onnx", same, 1, is_exact=True)], BATCHES)


def test_no_numbers_are_an_error() -> None:
    for number in (float("nan"), float("inf")):
        broken = Variant("onnx", lambda pixels, number=number: (pixels * number,), 1)
        with pytest.raises(CheckpointError, match="onnx: gives NaN or infinity"):
            compare([Variant("fp32", same, 1), broken], BATCHES)


def test_latencies_are_taken_in_turns() -> None:
    calls: list[str] = []

    def run(name: str) -> object:
        return lambda pixels: (calls.append(name), (pixels,))[1]

    times, rounds = latencies([run("a"), run("b")], BATCHES[0][0])  # type: ignore[list-item]
    assert len(times) == 2
    assert all(time > 0 for time in times)
    assert rounds >= LEAST_ROUNDS
    assert calls == ["a", "b"] * (rounds + 1), "each once to warm up, then in turns"


def test_the_table() -> None:
    variants = [Variant("fp32", same, 1_000_000), Variant("onnx, int8", same, 250_000)]
    agreements = [Agreement(4, 4, 0.0, 4, 3), Agreement(4, 3, 0.25, 4, 2)]
    assert as_table(variants, agreements, [2.0, 0.5], has_classes=True).splitlines() == [
        "              MB  ms/image  top-1 agreement  max difference  accuracy",
        "fp32        1.00      2.00                                    75.00 %",
        "onnx, int8  0.25      0.50          75.00 %            0.25   50.00 %",
    ]
    features = [Agreement(4), Agreement(4, 0, 1e-6)]
    assert as_table(variants, features, [2.0, 1.0], has_classes=False).splitlines()[0].split() == [
        "MB",
        "ms/image",
        "max",
        "difference",
    ]
