"""DeepSpeed's own checkpoints, of ZeRO 1 to 3: the fp32 weights, put together from what each rank saved.

Its files are pickles, which are read as any other file of weights (weight_files.py): nothing in them is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.interop.weight_files import read_file
from vitscale.text import listed

_LATEST = "latest"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_FLATS_3, _FLATS_2 = "fp32_flat_groups", "single_partition_of_fp32_groups"


def read_deepspeed(folder: Path) -> dict[str, Tensor]:
    """The weights (fp32) and buffers by their names in the module that was trained.

    folder: what save_checkpoint was given, or one of the folders in it. CheckpointError where files are missing, were
    cut by tensor parallelism, hold no fp32 weights, or would run anything.
    """
    folder = _tag(folder)
    models, optimizers = _files(folder, _MODEL), _files(folder, _OPTIMIZER)
    if not models:
        raise CheckpointError(f"{folder}: has no *_model_states.pt; name what DeepSpeed's save_checkpoint wrote")
    first = _read(models[0], "module", "param_shapes")
    if not optimizers:
        raise CheckpointError(
            f"{folder}: has no *_optim_states.pt, and the fp32 weights are in them; fetch the folder whole, or name "
            f"{models[0].name} itself where a file of weights is asked for (of ZeRO 0 to 2)"
        )
    parts = [_flats(path) for path in optimizers]
    ranks = max(count for _, _, count in parts)
    if ranks != len(parts):
        raise CheckpointError(
            f"{folder}: {ranks} ranks saved it, and {len(parts)} *_optim_states.pt are there; fetch it whole"
        )
    # Buffers, and of stage 1 what is frozen; under stage 3 weights are empty here.
    here = {name: each for name, each in first["module"].items() if isinstance(each, Tensor) and each.numel()}
    tensors = {name: each.float() if each.is_floating_point() else each for name, each in here.items()}
    tensors |= _frozen(models, first)
    joined = _of_stage_3 if parts[0][1] else _of_stage_2
    try:
        tensors |= joined(first["param_shapes"], [flats for flats, _, _ in parts])
    except RuntimeError:  # torch's, of a part that ends before its parameter does
        raise CheckpointError(f"{folder}: its files hold less than {models[0].name} says; fetch it whole") from None
    shared = dict(first.get("shared_params") or {})
    return tensors | {name: tensors[same] for name, same in shared.items() if same in tensors}


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


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Those of a pattern, by rank."""
    found = {path: match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    if any(int(match[2]) > 0 for match in found.values()):
        raise CheckpointError(
            f"{folder}: was divided by tensor parallelism (mp_rank_01); gather it with the code that trained it"
        )
    return sorted(found, key=lambda path: int(found[path][1] or 0))


def _read(path: Path, *keys: str) -> Mapping[str, Any]:
    content = read_file(path)
    if missing := [key for key in keys if not isinstance(content.get(key), (Mapping, list))]:
        raise CheckpointError(f"{path}: holds no {listed(missing)}, so it is no checkpoint of DeepSpeed's ZeRO")
    return content


def _flats(path: Path) -> tuple[list[Tensor], bool, int]:
    """One rank's flat fp32 weights by group, whether they are of stage 3, and how many ranks there were."""
    state = _read(path, "optimizer_state_dict")["optimizer_state_dict"]
    key = next((key for key in (_FLATS_3, _FLATS_2) if key in state), None)
    if key is None:
        raise CheckpointError(f"{path}: holds neither {_FLATS_3} nor {_FLATS_2}, so it is none of ZeRO 1 to 3")
    counts = state.get("partition_count", 1)
    return list(state[key]), key == _FLATS_3, max(counts) if isinstance(counts, list) else int(counts)


def _of_stage_2(groups: list[Mapping[str, torch.Size]], flats: list[list[Tensor]]) -> dict[str, Tensor]:
    """Each group is one vector, cut into equal parts by rank."""
    tensors = {}
    for number, shapes in enumerate(groups):
        whole, position = torch.cat([of_rank[number] for of_rank in flats]), 0
        for name, shape in shapes.items():
            tensors[name] = whole[position : position + shape.numel()].view(shape).clone()
            position += shape.numel()
    return tensors


def _of_stage_3(groups: list[Mapping[str, torch.Size]], flats: list[list[Tensor]]) -> dict[str, Tensor]:
    """Each parameter is cut into equal parts by rank, the last ones padded; a rank's parts follow each other."""
    tensors, position = {}, 0
    of_ranks = [torch.cat(of_rank) for of_rank in flats]
    for name, shape in (item for shapes in groups for item in shapes.items()):
        share = -(-shape.numel() // len(of_ranks))
        parts = [of_rank[position : position + share] for of_rank in of_ranks]
        tensors[name] = torch.cat(parts)[: shape.numel()].view(shape)
        position += share
    return tensors


def _frozen(models: list[Path], first: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights that were not trained: whole in the file of each rank, or under stage 3 a part in each."""
    shapes = first.get("frozen_param_shapes") or {}
    if not shapes:
        return {}
    parts = [_read(path, "module")["frozen_param_fragments"] for path in models]
    return {
        name: torch.cat([part[name].flatten() for part in parts])[: shape.numel()].view(shape).float()
        for name, shape in shapes.items()
    }
