"""A manifest that somebody forged, with a digest that is right: refused in one line by whoever reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vitscale.checkpoint.fragments import Piece
from vitscale.checkpoint.manifest import MANIFEST, STATE, as_text, read_manifest
from vitscale.checkpoint.saving import save_checkpoint
from vitscale.checkpoint.store import SoleRank, faults_of, open_checkpoint
from vitscale.engine.loop import TrainState
from vitscale.errors import CheckpointError

RUN = {
    "step": 5,
    "samples": 40,
    "losses": [0.5, 1e30],
    "bad": {"truncated": 1},
    "best": {"metric": "validation/loss", "value": -0.5, "step": 5},
    "order": {"the index": "0123"},
    "time": 1_800_000_000_000,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pieces = [Piece("param", "weight", (2, 3), 0, np.arange(6, dtype=np.float32))]
    return save_checkpoint(tmp_path, 5, pieces, RUN, SoleRank(), keep=9)


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(as_text(manifest))


def tensor(**changed: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["tensors"][0].update(changed)


def file(**changed: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["files"][0].update(changed)


def state(**changed: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["state"].update(changed)


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no pieces": tensor(pieces=[]),
    "too few pieces": tensor(pieces=[[0, 5, 1]]),
    "too many pieces": tensor(pieces=[[0, 6, 1], [0, 1, 1]]),
    "a negative count": tensor(pieces=[[0, -1, -6]]),
    "a negative file": tensor(pieces=[[-1, 6, 1]]),
    "a count of 0": tensor(pieces=[[0, 0, 1]]),
    "a file that is not there": tensor(pieces=[[99, 6, 1]]),
    "files beyond the last": tensor(pieces=[[0, 3, 2]]),
    "pieces that are no rows": tensor(pieces=[6]),
    "pieces of text": tensor(pieces=[["0", "6", "1"]]),
    "pieces that are true": tensor(pieces=[[False, 6, True]]),
    "pieces that are null": tensor(pieces=None),
    "other pieces of the same size": tensor(pieces=[[0, 3, 1], [0, 3, 1]]),
    "another shape": tensor(shape=[2, 4]),
    "a shape beyond all memory": tensor(shape=[2**40, 2**40], pieces=[[0, 2**40, 2**40]]),
    "a negative shape": tensor(shape=[-2, -3]),
    "a shape of text": tensor(shape="23"),
    "an unknown dtype": tensor(dtype="garbage"),
    "a dtype that is a list": tensor(dtype=["float32"]),
    "another dtype": tensor(dtype="int32"),
    "a dtype of objects": tensor(dtype="object"),
    "another name": tensor(name="other"),
    "a name that is a list": tensor(name=[1]),
    "a tensor twice": lambda manifest: manifest["tensors"].append(manifest["tensors"][0]),
    "tensors that are none": lambda manifest: manifest.update(tensors=[1]),
    "no tensors": lambda manifest: manifest.pop("tensors"),
    "no files": lambda manifest: manifest.pop("files"),
    "a file twice": lambda manifest: manifest["files"].append(manifest["files"][0]),
    "a size of text": file(bytes="9"),
    "a file without a name": file(name=None),
    "another step": lambda manifest: manifest.update(step=7),
    "no step": lambda manifest: manifest.pop("step"),
    "a state of another step": state(step=7),
    "no state": lambda manifest: manifest.update(state="garbage"),
    "a time of text": state(time="yesterday"),
    "a time beyond all calendars": state(time=10**18),
    "a best that is text": state(best="garbage"),
    "a best without a step": state(best={"metric": "a", "value": 1.0}),
    "samples of text": state(samples="many"),
    "fewer than no samples": state(samples=-1),
    "losses that are text": state(losses="abc"),
    "bad samples that are a list": state(bad=[1]),
    "an order without an index": state(order={}),
    "a model that is text": state(model="vit"),
    "pending tasks that are none": state(pending={"row": {}, "tasks": 1}),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_manifest_is_refused(folder: Path, name: str) -> None:
    forge(folder, FORGED[name])
    (fault,) = faults_of(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, SoleRank())
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_run_saves_is_taken(folder: Path) -> None:
    assert open_checkpoint(folder, SoleRank()).state == RUN
    elsewhere = folder.rename(folder.with_name("the-best"))  # a name of its own says no step
    assert open_checkpoint(elsewhere, SoleRank()).step == 5


@pytest.mark.parametrize("token", ["NaN", "1" * 5000, "[" * 99999])
def test_numbers_that_json_does_not_have(folder: Path, token: str) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"samples": 40', f'"samples": {token}'))
    with pytest.raises(ValueError, match="is no whole manifest"):
        read_manifest(folder)


@pytest.mark.parametrize(("name", "values"), [
    ("param/weight@0", np.ones(1, np.float32)),  # NumPy would repeat it
    ("param/weight@0", np.ones((2, 3), np.float32)),
    ("param/weight@0", np.ones(6, np.int32)),
    ("param/other@0", np.ones(6, np.float32)),
])  # fmt: skip
def test_a_file_that_holds_something_else(folder: Path, name: str, values: np.ndarray) -> None:
    path = folder / "state-00000.safetensors"
    save_file({name: values}, path)
    content = path.read_bytes()
    forge(folder, file(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    assert "state-00000.safetensors" in faults_of(folder)[0]
    with pytest.raises(CheckpointError, match="is not a usable checkpoint"):
        open_checkpoint(folder, SoleRank())
    unread = open_checkpoint(folder, SoleRank(), hashed=False)
    with pytest.raises(CheckpointError, match=r"state-00000\.safetensors"):
        unread.whole("param", "weight")


def test_a_file_that_is_no_safetensors(folder: Path) -> None:
    path = folder / "state-00000.safetensors"
    path.write_bytes(b"garbage")
    forge(folder, file(bytes=7, sha256=hashlib.sha256(b"garbage").hexdigest()))
    (fault,) = faults_of(folder)
    assert fault.startswith("state-00000.safetensors cannot be read")


def test_all_that_a_run_resumes_from_is_looked_at() -> None:
    assert {item.name for item in fields(TrainState)} <= STATE.keys()
