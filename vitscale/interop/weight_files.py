"""The files that named tensors lie in: safetensors or PyTorch's pickle, one file or several with an index.

Names here are those on disk; keymaps.py knows ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vitscale.errors import CheckpointError, ConfigError
from vitscale.files.atomic import flush_to_disk, staged
from vitscale.files.model_folder import INDEX, KINDS, PICKLE, WEIGHTS, as_text, is_weights, shards_of, weight_map
from vitscale.interop.checkpoints import read_file

MAX_SHARD_SIZE = "50GB"  # transformers' default


def read_weights(folder: Path) -> dict[str, Any]:
    """What a folder's files of weights hold, tensors on the CPU; see checkpoints.unwrap for what others wrap them in.

    CheckpointError if a file is missing, cut, or refused by `read_file`; and if an index names other files than
    those beside it, or other tensors than they hold.
    """
    found = next((folder / kind for kind in KINDS if (folder / kind).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder / WEIGHTS}: no such file; weights are {WEIGHTS} or {PICKLE}, or several with {WEIGHTS + INDEX}"
        )
    if not found.name.endswith(INDEX):
        return _mapping(found)
    tensors: dict[str, Any] = {}
    placed = weight_map(found)
    for shard in shards_of(found):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: no such file, and {found.name} names it; fetch the folder whole")
        part = _mapping(folder / shard)
        if part.keys() != {name for name, file in placed.items() if file == shard}:
            raise CheckpointError(f"{folder / shard}: holds other tensors than {found.name} says; fetch both again")
        tensors |= part
    return tensors


def _mapping(path: Path) -> dict[str, Any]:
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: must hold tensors by name, and holds {type(content).__name__}")
    return dict(content)


def write_folder(
    folder: Path, texts: Mapping[str, str], tensors: Mapping[str, Tensor], max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write a model's folder: small files by name, and the tensors in as many files as transformers would.

    All is written beside what is there, then put in its place, the weights (or their index) last, so that
    a folder with weights is complete. Weights that an earlier save left are taken away.
    max_shard_size: bytes, or a text such as "5GB". CheckpointError where the folder cannot be written.
    """
    shards, index = _split(tensors, max_shard_size)
    last = WEIGHTS if index is None else WEIGHTS + INDEX
    try:
        with staged(folder, last) as draft:
            for name, text in [*texts.items(), *([] if index is None else [(last, index)])]:
                (draft / name).write_text(text, encoding="utf-8")
            for name, names in shards.items():
                save_file({each: tensors[each] for each in names}, draft / name, metadata={"format": "pt"})
                flush_to_disk(draft / name)  # before the earlier ones go
            for earlier in _weights_in(folder):
                if earlier.name != WEIGHTS or last != WEIGHTS:  # a single file is replaced in one go
                    earlier.unlink()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{folder}: cannot be written: {reason}; name another folder") from None


def _split(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> tuple[dict[str, list[str]], str | None]:
    """Which tensors each file holds, and the index's text where they are several."""
    from huggingface_hub import split_state_dict_into_shards_factory

    wrong = ConfigError(f"max_shard_size={max_shard_size!r}: must be bytes above 0, or a text such as 5GB or 200MB")
    if not isinstance(max_shard_size, str) and max_shard_size < 1:
        raise wrong
    try:
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            get_storage_id=lambda tensor: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError:
        raise wrong from None
    if not split.is_sharded:
        return {WEIGHTS: list(tensors)}, None
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return split.filename_to_tensors, as_text(index)


def _weights_in(folder: Path) -> list[Path]:
    """The index first: with it gone, what is left of an earlier save is no model."""
    return sorted(
        (path for path in folder.iterdir() if is_weights(path.name)), key=lambda path: not path.name.endswith(INDEX)
    )
