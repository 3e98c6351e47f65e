"""DeepSpeed's own checkpoints, of ZeRO 1 to 3: the fp32 weights, put together from what each rank saved.

Its files are pickles, which are read as any other file of weights (weight_files.py): nothing in them is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.interop.weight_files import read_file
from vitscale.text import listed

Shapes = Mapping[str, torch.Size]
_LARGEST = 2**48  # numbers in a tensor
_LATEST = "latest"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_FLATS_3, _FLATS_2 = "fp32_flat_groups", "single_partition_of_fp32_groups"


@dataclass(frozen=True)
class _Model:
    """What a file of model states says."""

    module: Mapping[str, Any]  # weights and buffers, and what else a module may keep
    groups: Sequence[Shapes]  # of the trained parameters
    frozen: Shapes
    fragments: Mapping[str, Tensor]  # of the frozen parameters, this rank's
    shared: Mapping[str, str]  # a parameter's name -> that of the same one


@dataclass(frozen=True)
class _Optimizer:
    """What a file of one rank's optimizer states says."""

    flats: Sequence[Tensor]  # fp32 weights by group
    is_stage_3: bool
    ranks: int  # how many saved
    gaps: Sequence[Sequence[int]] | None  # of ZeRO 1 and 2, by group: elements without use behind each parameter


def read_deepspeed(folder: Path) -> dict[str, Tensor]:
    """The weights (fp32) and buffers by their names in the module that was trained.

    folder: what save_checkpoint was given, or one of the folders in it. CheckpointError where files are missing, were
    cut by tensor parallelism, hold no fp32 weights or not those that they say, or would run anything.
    """
    folder = _tag(folder)
    models, optimizers = _files(folder, _MODEL), _files(folder, _OPTIMIZER)
    if not models:
        raise CheckpointError(f"{folder}: has no *_model_states.pt; name what DeepSpeed's save_checkpoint wrote")
    first = _model(models[0])
    if not optimizers:
        raise CheckpointError(
            f"{folder}: has no *_optim_states.pt, and the fp32 weights are in them; fetch the folder whole, or name "
            f"{models[0].name} itself where a file of weights is asked for (of ZeRO 0 to 2)"
        )
    parts = {rank: _optimizer(path) for rank, path in optimizers.items()}
    ranks, stage_3 = max(part.ranks for part in parts.values()), next(iter(parts.values())).is_stage_3
    _require_ranks(folder, "*_optim_states.pt", parts.keys(), ranks)
    if any(part.is_stage_3 != stage_3 or len(part.flats) != len(parts[0].flats) for part in parts.values()):
        raise CheckpointError(f"{folder}: its *_optim_states.pt are of several runs; fetch them again")
    # Buffers, and of stage 1 what is frozen; under stage 3 weights are empty here.
    here = {name: each for name, each in first.module.items() if isinstance(each, Tensor) and each.numel()}
    tensors = {name: each.float() if each.is_floating_point() else each for name, each in here.items()}
    if first.frozen:
        if stage_3:
            _require_ranks(folder, "*_model_states.pt", models.keys(), ranks)
        tensors |= _frozen(folder, first.frozen, [_model(path).fragments for path in models.values()])
    joined = _of_stage_3 if stage_3 else _of_stage_2
    tensors |= joined(folder, first.groups, [parts[rank] for rank in range(ranks)])
    return tensors | {name: tensors[same] for name, same in first.shared.items() if same in tensors}


def _tag(folder: Path) -> Path:
    """The folder of one checkpoint: that which `latest` names, or the folder itself."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    latest = folder / _LATEST
    if not latest.is_file():
        return folder
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not tag or "/" in tag or not (folder / tag).is_dir():
        there = listed(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise CheckpointError(f"{latest}: names {tag!r}, which is not there; name one of {there or 'none'} itself")
    return folder / tag


def _files(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Those of a pattern, by rank."""
    found = {path: match for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))}
    if any(int(match[2]) > 0 for match in found.values()):
        raise CheckpointError(
            f"{folder}: was divided by tensor parallelism (mp_rank_01); gather it with the code that trained it"
        )
    return dict(sorted((int(match[1] or 0), path) for path, match in found.items()))


def _require_ranks(folder: Path, what: str, there: Collection[int], ranks: int) -> None:
    if len(there) != ranks or max(there) != ranks - 1:
        raise CheckpointError(
            f"{folder}: {ranks} ranks saved it, and {len(there)} {what} are there (of ranks {listed(sorted(there))}); "
            "fetch it whole"
        )


# ---- what the files say, held against what DeepSpeed writes


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(map(_is_size, value)) and math.prod(value) < _LARGEST


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point()


def _of(test: Callable[[Any], bool], value: Any) -> bool:
    """A list, or a mapping by names, of what the test lets pass."""
    if isinstance(value, Mapping):
        return all(map(_is_name, value)) and all(map(test, value.values()))
    return isinstance(value, (list, tuple)) and all(map(test, value))


def _of_shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and _of(_is_shape, value)


def _entry(path: Path, content: Mapping[Any, Any], key: str, test: Callable[[Any], bool], default: Any = None) -> Any:
    """What a file holds under a key; None is as if it were not there. CheckpointError where the test fails."""
    value = content.get(key)
    value = default if value is None else value
    if value is None or not test(value):
        what = "no" if content.get(key) is None else "another kind of"
        raise CheckpointError(f"{path}: holds {what} {key}, so it is no checkpoint of DeepSpeed's ZeRO")
    return value


def _model(path: Path) -> _Model:
    content = read_file(path)

    def by_name(key: str, test: Callable[[Any], bool]) -> Mapping[str, Any]:
        return _entry(path, content, key, lambda value: isinstance(value, Mapping) and _of(test, value), {})

    groups = _entry(
        path, content, "param_shapes", lambda value: isinstance(value, list) and all(map(_of_shapes, value))
    )
    return _Model(
        module=_entry(path, content, "module", lambda value: isinstance(value, Mapping) and all(map(_is_name, value))),
        groups=[{name: torch.Size(shape) for name, shape in group.items()} for group in groups],
        frozen={name: torch.Size(shape) for name, shape in by_name("frozen_param_shapes", _is_shape).items()},
        fragments=by_name("frozen_param_fragments", _is_tensor),
        shared=by_name("shared_params", _is_name),
    )


def _optimizer(path: Path) -> _Optimizer:
    state = _entry(path, read_file(path), "optimizer_state_dict", lambda value: isinstance(value, Mapping))
    key = next((key for key in (_FLATS_3, _FLATS_2) if key in state), None)
    if key is None:
        raise CheckpointError(f"{path}: holds neither {_FLATS_3} nor {_FLATS_2}, so it is none of ZeRO 1 to 3")
    flats = _entry(path, state, key, lambda value: isinstance(value, list) and bool(value) and _of(_is_flat, value))
    counts = state.get("partition_count", 1)
    counts = counts if isinstance(counts, list) and counts else [counts]
    if not all(_is_size(count) and count for count in counts):
        raise CheckpointError(f"{path}: holds another kind of partition_count than the number of ranks")
    gaps = state.get("param_alignment_paddings")
    if gaps is not None and not (isinstance(gaps, list) and all(map(_is_shape, gaps))):
        raise CheckpointError(f"{path}: holds another kind of param_alignment_paddings")
    return _Optimizer(flats, key == _FLATS_3, max(counts), gaps)


# ---- joined


def _of_stage_2(folder: Path, groups: Sequence[Shapes], parts: Sequence[_Optimizer]) -> dict[str, Tensor]:
    """Each group is one vector, cut into equal parts by rank; its end is padded to a multiple of twice the ranks."""
    tensors, aligned = {}, 2 * len(parts)
    _require_as_many(folder, len(groups), len(parts[0].flats), "groups")
    for number, shapes in enumerate(groups):
        whole, position = torch.cat([part.flats[number] for part in parts]), 0
        gaps = [0] * len(shapes)
        if (told := parts[0].gaps) is not None:
            _require_as_many(folder, len(groups), len(told), "groups in param_alignment_paddings")
            gaps = list(told[number])
            _require_as_many(folder, len(shapes), len(gaps), "param_alignment_paddings")
        needed = sum(shape.numel() for shape in shapes.values()) + sum(gaps)
        if needed > whole.numel() or -(-needed // aligned) != -(-whole.numel() // aligned):
            raise _other_numbers(folder, whole.numel(), needed)
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            tensors[name] = whole[position : position + shape.numel()].view(shape).clone()
            position += shape.numel() + gap
    return tensors


def _of_stage_3(folder: Path, groups: Sequence[Shapes], parts: Sequence[_Optimizer]) -> dict[str, Tensor]:
    """Each parameter is cut into equal parts by rank, the last ones padded; a rank's parts follow each other."""
    tensors, position = {}, 0
    of_ranks = [torch.cat(list(part.flats)) for part in parts]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    shares = {name: -(-shape.numel() // len(parts)) for name, shape in shapes.items()}
    for of_rank in of_ranks:
        if of_rank.numel() != sum(shares.values()):
            raise _other_numbers(folder, of_rank.numel(), sum(shares.values()))
    for name, shape in shapes.items():
        pieces = [of_rank[position : position + shares[name]] for of_rank in of_ranks]
        tensors[name] = torch.cat(pieces)[: shape.numel()].view(shape)
        position += shares[name]
    return tensors


def _frozen(folder: Path, shapes: Shapes, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weights that were not trained: whole in the file of each rank, or under stage 3 a part in each."""
    tensors = {}
    for name, shape in shapes.items():
        pieces = [part[name].flatten() for part in parts if name in part]
        held = sum(piece.numel() for piece in pieces)
        if len(pieces) < len(parts) or not shape.numel() <= held < shape.numel() + len(parts):
            raise CheckpointError(
                f"{folder}: its files hold {held} numbers of {name}, which is frozen and has {shape.numel()}; fetch it "
                "whole"
            )
        tensors[name] = torch.cat(pieces)[: shape.numel()].view(shape).float()
    return tensors


def _require_as_many(folder: Path, expected: int, found: int, what: str) -> None:
    if expected != found:
        raise CheckpointError(
            f"{folder}: its files have {found} {what}, and {expected} in param_shapes; fetch it again"
        )


def _other_numbers(folder: Path, held: int, needed: int) -> CheckpointError:
    what = "less" if held < needed else "more"
    return CheckpointError(
        f"{folder}: its *_optim_states.pt hold {what} than its model states say: {held} numbers, and {needed} are "
        "needed; fetch it whole"
    )
