"""manifest.json of a checkpoint: what its files hold, and by a digest of its own that it is whole.

A digest tells damage, not who wrote it: all that is read here is held against what a save writes, so that nobody who
reads a manifest further on need ask again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from vitscale.checkpoint.fragments import DTYPES

FORMAT = 2
READABLE = (1, 2)  # 1: a row (file, start, count) a piece; 2: a row (file, count, files) a stretch of equal pieces
MANIFEST = "manifest.json"
READ_ERRORS = (OSError, ValueError)  # of a manifest that is not what it should be
_STEP = re.compile(r"(?:\.old-|bad-)?step_(\d{8,})")
_STATE_FILE = re.compile(r"state-\d{5,}\.safetensors")
_LARGEST = 2**53  # beyond that a number of JSON is no longer exact


def as_text(manifest: dict[str, Any]) -> str:
    """The manifest as JSON with its own digest, a line for each file and each tensor."""
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as a reader will see it: text keys, lists
    manifest["sha256"] = _digest(manifest)
    parts = []
    for name, value in manifest.items():
        lines = ",\n  ".join(json.dumps(item) for item in value) if isinstance(value, list) else None
        parts.append(f" {json.dumps(name)}: " + (json.dumps(value) if lines is None else f"[\n  {lines}\n ]"))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder; raises one of READ_ERRORS that says what is wrong with it."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    try:
        manifest = json.loads(text, parse_constant=_no_number)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is no whole manifest ({error})") from None
    if version not in READABLE:
        raise ValueError(
            f"{MANIFEST} has format {version!r}, this vitscale reads up to {FORMAT}: use the vitscale that wrote it"
        )
    expected, found = manifest.get("sha256"), _digest(manifest)
    if expected != found:
        raise ValueError(f"{MANIFEST} does not match its own sha256 ({short(found)}, says {short(expected)})")
    _require_files(manifest)
    _require_tensors(manifest)
    _require_state(manifest, folder)
    return manifest


def short(digest: Any) -> str:
    """A digest for messages."""
    return f"{str(digest)[:12]}..."


def _digest(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's content, however it is laid out as text."""
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- what a save writes


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < _LARGEST)


def _is_duration(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_time(value: Any) -> bool:
    """Milliseconds, of a year that a calendar has."""
    return _is_count(value) and value < 10**14


def _is_best(value: Any) -> bool:
    tests = {"step": _is_count, "metric": _is_text, "value": _is_number}
    return value is None or (isinstance(value, dict) and all(test(value.get(name)) for name, test in tests.items()))


def _is_pending(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and isinstance(value.get("row"), dict) and _list_of(_is_text)(value.get("tasks"))
    )


def _is_order(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("the index"))


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


# Of a run's state, by key. What is compared or shown alone may be anything.
STATE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "samples", "epoch", "retries", "save_failures", "total_steps", "adam_step"), _is_count),
    **dict.fromkeys(("skipped", "skipped_in_a_row", "spikes", "spikes_in_a_row", "without_better"), _is_count),
    **dict.fromkeys(("elapsed_s", "save_seconds"), _is_duration),
    **dict.fromkeys(("job", "decoder"), _is_text),
    "shift": lambda value: type(value) is int and abs(value) < _LARGEST,
    "losses": _list_of(_is_number),
    "skipped_batches": _list_of(_is_count),
    "bad": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "best": _is_best,
    "early_stopped": lambda value: isinstance(value, bool),
    "pending": _is_pending,
    "order": _is_order,
    "model": lambda value: isinstance(value, dict),
    "time": _is_time,
}


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{MANIFEST} {what}, which no save writes")


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _require_files(manifest: dict[str, Any]) -> None:
    files, tests = manifest.get("files"), {"name": _is_text, "bytes": _is_count, "sha256": _is_text}
    whole = _list_of(lambda file: isinstance(file, dict) and all(test(file.get(key)) for key, test in tests.items()))
    _require(whole(files), "has files without name, bytes or sha256")
    assert isinstance(files, list)
    for name in (file["name"] for file in files):  # also keeps a forged manifest from naming a path elsewhere
        _require(_STATE_FILE.fullmatch(name) is not None, f"says {name!r}, which is no name of a state file")
    _require(len({file["name"] for file in files}) == len(files), "names a file twice")


def _require_tensors(manifest: dict[str, Any]) -> None:
    """That the pieces of each tensor make it up; the rows are those of format 2 then."""
    tensors, files, seen = manifest.get("tensors"), len(manifest["files"]), set()
    _require(isinstance(tensors, list), "lists no tensors")
    assert isinstance(tensors, list)
    for tensor in tensors:
        known = isinstance(tensor, dict) and _is_text(tensor.get("kind")) and _is_text(tensor.get("name"))
        _require(known, "has a tensor without kind or name")
        kind, name, shape, rows = tensor["kind"], tensor["name"], tensor.get("shape"), tensor.get("pieces")
        of = f"of {kind} {name!r} says"
        _require((kind, name) not in seen, f"{of} two shapes")
        seen.add((kind, name))
        _require(_list_of(_is_count)(shape), f"{of} the shape {shape!r}")
        _require(_is_text(tensor.get("dtype")) and tensor["dtype"] in DTYPES, f"{of} the dtype {tensor.get('dtype')!r}")
        whole = _list_of(lambda row: isinstance(row, list) and len(row) == 3 and all(map(_is_count, row)))
        _require(whole(rows), f"{of} pieces that are no rows of three numbers")
        if manifest["format"] == 1:
            rows = tensor["pieces"] = _as_stretches(rows, of)
        held = all(count and number and file + number <= files for file, count, number in rows)
        _require(held, f"{of} pieces in files that it does not name, or empty ones")
        held_size, size = sum(count * number for _, count, number in rows), math.prod(shape)
        _require(held_size == size, f"{of} pieces of {held_size} elements, and {size} are its shape's")


def _as_stretches(rows: list[list[int]], of: str) -> list[list[int]]:
    """Rows of format 1 in format 2."""
    position = 0
    for _, start, count in rows:
        _require(start == position, f"{of} pieces that do not follow each other")
        position += count
    return [[file, count, 1] for file, _, count in rows]


def _require_state(manifest: dict[str, Any], folder: Path) -> None:
    step, state = manifest.get("step"), manifest.get("state")
    _require(_is_count(step), f"says the step {step!r}")
    own = _STEP.fullmatch(folder.name)
    if own is not None and int(own[1]) != step:
        raise ValueError(f"{MANIFEST} is of step {step}, and the folder's name is not")
    _require(isinstance(state, dict), "holds no state of a run")
    assert isinstance(state, dict)
    for key, test in STATE.items():
        if key in state:
            _require(test(state[key]), f"says state.{key}={str(state[key])[:40]!r}")
    _require(state.get("step", step) == step, f"says state.step={state.get('step')}, and step={step}")
