"""Tensors that are there, or not, by name and shape: what differs is named in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.text import listed

Shapes = dict[str, tuple[int, ...]]


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def require_equal(expected: Shapes, actual: Shapes, where: str) -> None:
    """CheckpointError where names or shapes differ."""
    other = [
        f"{name} {list(actual[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    refuse(where, missing=expected.keys() - actual.keys(), unexpected=actual.keys() - expected.keys(), other=other)


def refuse(
    where: str, missing: Iterable[str] = (), unexpected: Iterable[str] = (), other: Iterable[str] = (), way: str = ""
) -> None:
    """CheckpointError that names these tensors, if there are any; `way`: the way out."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    parts = [f"{kind}: {listed(sorted(names))}" for kind, names in kinds.items() if names]
    if parts:
        raise CheckpointError(f"{where}: tensors {'; '.join(parts)}{way}")
