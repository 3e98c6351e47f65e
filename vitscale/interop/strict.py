"""Tensors that are there, or not, by name and shape: what differs is named in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.text import listed

Shapes = dict[str, tuple[int, ...]]
# Tensors that tell of what no ViTConfig expresses, or of a file that is not as it was trained.
_FOREIGN = {
    r"dist_token|head_dist": "of DeiT's distillation token",
    r"rel_pos|relative_position": "of relative positions, as BEiT's and SimMIM's own",
    r"norm_pre|ln_pre": "of CLIP's norm before the blocks",
    r"attn_pool": "of a pooling by attention, as SigLIP's",
    r"downsample|^layers\.\d+\.blocks|^stages\.": "of stages, as Swin's",
}
_REMEDIES = {
    "missing": "name a file with the whole model, or fetch it again",
    "unexpected": "save the state without them if the model does without",
    "of another shape": "give the sizes that they have, or fetch config.json and weights again",
}


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def require_equal(expected: Shapes, actual: Shapes, where: str, hint: str = "") -> None:
    """CheckpointError where names or shapes differ; hint: see `refuse`."""
    other = [
        f"{name} {list(actual[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    refuse(where, expected.keys() - actual.keys(), actual.keys() - expected.keys(), other, hint)


def refuse(
    where: str, missing: Iterable[str] = (), unexpected: Iterable[str] = (), other: Iterable[str] = (), hint: str = ""
) -> None:
    """CheckpointError that names these tensors, if there are any; hint: what to do, where the caller knows."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    parts = {kind: listed(sorted(names)) for kind, names in kinds.items() if names}
    if parts:
        named = "; ".join(f"{kind}: {names}" for kind, names in parts.items())
        foreign = (what for pattern, what in _FOREIGN.items() for name in unexpected if re.search(pattern, name))
        if (what := next(foreign, None)) is not None:
            hint = f"they are {what}, which no ViTConfig has: take another model, or the library that saved this one"
        raise CheckpointError(f"{where}: tensors {named}; {hint or _REMEDIES[next(iter(parts))]}")
