"""What the files of a model's folder are called, and its JSON ones read and written: as transformers has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vitscale.errors import CheckpointError
from vitscale.files.atomic import write_atomically

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # endings of what others save
INDEX = ".index.json"  # follows the name of the weights where they are in several files
KINDS = (WEIGHTS, WEIGHTS + INDEX, PICKLE, PICKLE + INDEX)  # the first that is there is taken, as by transformers
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping. CheckpointError where it is missing or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model's folder holds config.json and its weights") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a mapping")
    return content


def as_text(content: dict[str, Any]) -> str:
    """JSON as it stands in a model's folder."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping as JSON. CheckpointError where that cannot be."""
    try:
        write_atomically(path, as_text(content))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}; name another folder") from None


def shards_of(index: Path) -> list[str]:
    """The files that an index names, each once.

    CheckpointError where it is broken, or names anything but files beside it.
    """
    suffix = ".safetensors" if index.name.startswith(WEIGHTS) else ".bin"
    files = sorted(set(weight_map(index).values()))
    for file in files:
        if Path(file).name != file or "\\" in file or not file.endswith(suffix):
            raise CheckpointError(f"{index}: names {file!r}; must name *{suffix} files that lie beside it")
    return files


def weight_map(index: Path) -> dict[str, str]:
    placed = read_json(index).get("weight_map")
    if not placed or not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"{index}: its weight_map must give the file of each tensor; fetch it again")
    return placed


def stands_for_folder(file: Path) -> bool:
    """Whether this is a file of weights that the folder around it, with its config.json, is read from."""
    if not file.is_file() or not file.with_name(CONFIG).is_file():
        return False
    read = next((kind for kind in KINDS if file.with_name(kind).is_file()), "")
    return file.name == read or (read.endswith(INDEX) and file.suffix == ".safetensors")


def is_weights(file: str) -> bool:
    """Whether we could have written a file of this name with weights, or their index."""
    return file in (WEIGHTS, WEIGHTS + INDEX) or _SHARD.fullmatch(file) is not None
