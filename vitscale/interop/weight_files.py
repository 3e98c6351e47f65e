"""The files that named tensors lie in: safetensors or PyTorch's pickle, one file or several with an index.

Names here are those on disk; keymaps.py knows ours.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import FRAME, UnpicklingError  # to name what torch.load raises; nothing is unpickled here
from typing import Any
from warnings import catch_warnings

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitscale.errors import CheckpointError, ConfigError
from vitscale.files.atomic import flush_to_disk, staged
from vitscale.files.model_folder import INDEX, KINDS, PICKLE, WEIGHTS, as_text, is_weights, shards_of, weight_map
from vitscale.text import first_sentence

MAX_SHARD_SIZE = "50GB"  # transformers' default
SAVE_STATE = "save model.state_dict() with torch.save, and name that file"
# What a file may be that is none of weights, by its first bytes or a name in its zip archive, and what to do.
_OTHERS = (
    (b"version https://git-lfs", "is a git-lfs pointer: `git lfs pull`"),
    (b"<", "is a web page: fetch the file that it is about"),
    (b"{", "is JSON: name the folder that it lies in, or the weights"),
    (b"\x1f\x8b", "is compressed: unpack it by gunzip"),
    (b"BZh", "is compressed: unpack it by bunzip2"),
    (b"\xfd7zXZ", "is compressed: unpack it by unxz"),
    (b"\x89HDF", "is HDF5, as of TensorFlow: fetch PyTorch's or safetensors' file of that model"),
)
_IN_ARCHIVES: tuple[tuple[str | tuple[str, ...], str], ...] = (
    ("constants.pkl", "is TorchScript: name a file of torch.jit.load(FILE).state_dict()"),
    (
        ("/models/model.json", "/serialized_exported_program.json"),
        "is a program of torch.export: name the model that it was made of",
    ),
    (".npy", "is NumPy's archive: make tensors of its arrays, and save them by safetensors"),
    ((".pth", ".pt", ".bin", ".ckpt", ".safetensors"), "is an archive of files: unpack it"),
)  # fmt: skip
_CUT = "is cut or damaged: fetch it again"


class Inert:
    """Stands for a class or function that is not known: whatever it is given, it does nothing and keeps nothing."""

    is_module = False  # a torch.nn.Module, as its state tells

    def __new__(cls, *arguments: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.is_module = isinstance(state, Mapping) and "_modules" in state


class _InertMapping:
    """The same for a mapping: what comes of it is a Counter, which torch lets a pickle fill."""

    def __new__(cls, *arguments: Any) -> Any:
        return collections.Counter()


class _InertList:
    def __new__(cls, *arguments: Any) -> Any:
        return []


class _DType:
    """NumPy's dtype: the code of a number, and its byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class Array:
    """NumPy's array, as a tensor where it is of plain numbers. NumPy itself makes none: a file may give its dtype flags
    with which bytes would be taken for addresses of objects."""

    def __init__(self, *_: Any) -> None:
        self.tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        if isinstance(data, bytes) and re.fullmatch("f[248]|i[1248]|u1|b1", dtype.code):
            numbers = np.frombuffer(data, np.dtype(dtype.code).newbyteorder(dtype.order)).astype(dtype.code)
            self.tensor = torch.from_numpy(numbers.reshape(shape, order="F" if by_columns else "C"))


# Harmless classes that checkpoints hold beside tensors, by the names under which they may be pickled.
_HARMLESS: tuple[tuple[Any, str], ...] = (
    *((kind, f"builtins.{kind.__name__}") for kind in (bool, int, float, str, list, tuple, dict, frozenset, slice)),
    (argparse.Namespace, "argparse.Namespace"),
    (types.SimpleNamespace, "types.SimpleNamespace"),
    (_InertMapping, "collections.defaultdict"),
    *((pathlib.PurePath, f"pathlib{local}.{name}") for local in ("", "._local") for name in (
        "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *((Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_DType, "numpy.dtype"),
)  # fmt: skip
# Modules and functions that no checkpoint needs: a file that asks for them is an attack, or no checkpoint.
_NEVER = re.compile(
    r"(os|posix|nt|sys|subprocess|commands|shutil|socket|importlib|runpy|ctypes|pickle|_pickle|code|pty|webbrowser)(\.|$)"
    r"|(__import__|apply|breakpoint|compile|delattr|eval|exec|execfile|getattr|globals|input|open|setattr)$"
)


def read_weights(folder: Path) -> dict[str, Any]:
    """What a folder's files of weights hold, tensors on the CPU; see checkpoints.unwrap for what others wrap them in.

    CheckpointError if a file is missing, cut, or refused by `read_file`; and if an index names other files than
    those beside it, or other tensors than they hold.
    """
    file = next((folder / kind for kind in KINDS if (folder / kind).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder / WEIGHTS}: no such file; weights are {WEIGHTS} or {PICKLE}, or several with {WEIGHTS + INDEX}"
        )
    if not file.name.endswith(INDEX):
        return read_file(file)
    tensors: dict[str, Any] = {}
    placed = weight_map(file)
    for shard in shards_of(file):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: no such file, and {file.name} names it; fetch the folder whole")
        part = read_file(folder / shard)
        if part.keys() != {name for name, each in placed.items() if each == shard}:
            raise CheckpointError(f"{folder / shard}: holds other tensors than {file.name} says; fetch both again")
        tensors |= part
    return tensors


def read_file(path: Path) -> dict[Any, Any]:
    """What a file of weights holds, tensors on the CPU. CheckpointError if it is broken, holds no mapping, or would run
    anything.

    torch reads pickles with weights_only. Beside tensors and plain values, classes that are harmless are made,
    and those that are not known become inert objects; names of modules that can do harm are refused.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if start[8:9] == b"{":  # behind the length of the header
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}; it {_CUT}") from None
    if (other := _what_else(path, start)) is not None:
        raise CheckpointError(f"{path}: holds no weights, it {other}")
    content = _read_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: must hold tensors by name, and holds {type(content).__name__}; {SAVE_STATE}")
    return dict(content)


def _read_pickle(path: Path) -> Any:
    inert: dict[str, Any] = {}
    while True:
        stand_ins = ((each, f"{module}{name}") for name, each in inert.items() for module in ("", "builtins."))
        known: list[Any] = [*_HARMLESS, *stand_ins]  # torch's errors leave out "builtins."
        try:  # by its name torch would go by the ending; what it warns of is its own code
            with torch.serialization.safe_globals(known), open(path, "rb") as stream, catch_warnings(action="ignore"):
                content = torch.load(stream, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            if (filled := _filled(error, inert)) is not None:
                inert |= filled
                continue
            name = _refused_name(error, path)
            if _NEVER.match(name) or name in inert:
                raise CheckpointError(
                    f"{path}: asks for {name}, which could run anything; get these weights as safetensors"
                ) from None
            inert[name] = type(name, (Inert,), {})
        except Exception as error:  # on a damaged file it raises nearly anything
            reason = first_sentence(f"{type(error).__name__}: {error}")
            remedy = SAVE_STATE if _is_whole(path) else f"it {_CUT}"
            raise CheckpointError(f"{path}: cannot be read as PyTorch's pickle: {reason}; {remedy}") from None
        else:
            if isinstance(content, Inert):
                raise CheckpointError(f"{path}: holds a {type(content).__name__}, not its tensors; {SAVE_STATE}")
            return content


def _is_whole(path: Path) -> bool:
    """Whether this is an archive of torch.save of which nothing is missing or altered."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # of a damaged archive, whatever it is
        return False


def _filled(error: UnpicklingError, inert: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stand-in that torch would not fill with items, as one that it does: a mapping or a list."""
    text = str(error)
    name = next((name for name, kind in inert.items() if f".{name}'" in text and issubclass(kind, Inert)), None)
    if name is None or not ("SETITEM" in text or "append to lists" in text or "extend lists" in text):
        return None
    return {name: type(name, (_InertMapping if "SETITEM" in text else _InertList,), {})}


def _refused_name(error: UnpicklingError, path: Path) -> str:
    """The global that torch did not let in; CheckpointError if it ended for another cause."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked is not None:
        return asked[1]
    if "Only persistent_load" in str(error):
        raise CheckpointError(f"{path}: holds modules in the format before torch 1.6; {SAVE_STATE}") from None
    if "DTensor" in str(error):
        raise CheckpointError(
            f"{path}: its tensors are sharded (DTensor of FSDP2); gather them before saving: "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
        ) from None
    reason = first_sentence(str(error).rpartition("WeightsUnpickler error:")[2])
    if f"operand {FRAME[0]}" in reason:
        raise CheckpointError(
            f"{path}: is a pickle of protocol 4 or later, which torch reads only where it may run code; if you trust "
            "the file: torch.save(torch.load(FILE, weights_only=False), NEW_FILE)"
        ) from None
    remedy = f"it {_CUT}" if "Unsupported operand" in reason else SAVE_STATE
    raise CheckpointError(f"{path}: cannot be read as PyTorch's pickle: {reason}; {remedy}") from None


def _what_else(path: Path, start: bytes) -> str | None:
    """What a file of these first bytes is, where it is neither safetensors nor a file of torch.save."""
    if start.startswith(b"PK"):
        try:
            names = zipfile.ZipFile(path).namelist()
        except zipfile.BadZipFile:  # torch says why
            return None
        return next((text for end, text in _IN_ARCHIVES if any(name.endswith(end) for name in names)), None)
    if start.startswith(b"\x80"):
        return None
    if start[257:262] == b"ustar":
        return "is a tar archive: unpack it, and name the weights in it"
    return next((text for magic, text in _OTHERS if start.lstrip().startswith(magic)), _CUT)


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
            earlier = [path for path in folder.iterdir() if is_weights(path.name)]
            # The index first: with it gone, what is left of an earlier save is no model.
            for path in sorted(earlier, key=lambda path: not path.name.endswith(INDEX)):
                if path.name != WEIGHTS or last != WEIGHTS:  # a single file is replaced in one go
                    path.unlink()
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
