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
    r"\.proj_[lw]\.": "of CaiT's attention across heads",
    r"^patch_embed\.(?!proj\.)": "of layers before the patches, as hybrids have",
}
_BLOCK_NORM = re.compile(r"^blocks\.\d+\.norm1\.weight$")
_NO_CONFIG = "which no ViTConfig has: take another model, or the library that saved this one"
_REMEDIES = {
    "missing": "name a file with the whole model, or fetch it again",
    "unexpected": "save the state without them if the model does without",
    "of another shape": "give the sizes that they have, or fetch config.json and weights again",
}


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_foreign(tensors: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError where names, or the widths of blocks, are of what no ViTConfig expresses."""
    if any(".lora_" in name or ".base_layer." in name for name in tensors):
        raise CheckpointError(f"{where}: holds LoRA's matrices beside the weights; merge them (PEFT's "
                              "merge_and_unload()), and save the state of what comes out")  # fmt: skip
    kinds = {what: [name for name in tensors if re.search(pattern, name)] for pattern, what in _FOREIGN.items()}
    norms = [name for name in tensors if _BLOCK_NORM.match(name)]
    if len({tensors[name].shape for name in norms}) > 1:
        kinds["of stages whose blocks differ in width, as Hiera's"] = norms
    for what, names in kinds.items():
        if names:
            raise CheckpointError(f"{where}: tensors {listed(names, 3)} are {what}, {_NO_CONFIG}")


def require_equal(expected: Shapes, actual: Shapes, where: str) -> None:
    """CheckpointError where names or shapes differ."""
    other = [
        f"{name} {list(actual[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    refuse(where, expected.keys() - actual.keys(), actual.keys() - expected.keys(), other)


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
            hint = f"they are {what}, {_NO_CONFIG}"
        raise CheckpointError(f"{where}: tensors {named}; {hint or _REMEDIES[next(iter(parts))]}")
