"""A model in one library's files -> the same model in another's, checked by that library before it is there.

FROM is told by what it holds: a folder of ours or of transformers, a run's folder, a folder of timm, a hub
name of either, or a .pth of the MAE code. TO appears whole, or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscale.conversion import mae, timm, witnesses
from vitscale.conversion.command import TARGETS
from vitscale.conversion.witnesses import Absent, Outputs, Witness, in_a_line
from vitscale.errors import CheckpointError, ConfigError, VitscaleError
from vitscale.interop.config_files import read_json
from vitscale.interop.image_processing import PROCESSOR, ViTImageProcessor, processor_dict
from vitscale.interop.keymaps import places
from vitscale.interop.mae import read_mae
from vitscale.interop.pretrained import load_model, write_model
from vitscale.interop.sources import CONFIG, locate
from vitscale.interop.timm import is_timm, read_timm
from vitscale.interop.vision_transformer import Opened
from vitscale.interop.weight_files import MAX_SHARD_SIZE
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.positions import fixed_positions
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.text import listed

# Of the largest number in an output: what float32 and another order of sums leave, with a margin.
TOLERANCE = 1e-4
_TRANSFORMERS_HAS = "transformers' ViT has none of it; --to vitscale writes a folder that opens here, --to timm may too"


@dataclass(frozen=True)
class Check:
    """How far other code's outputs are from ours on random images."""

    what: str  # "FROM" or "TO", and who opened it
    output: str  # the one that differs most
    difference: float  # the largest, absolute
    scale: float  # the largest number in that output

    @property
    def good(self) -> bool:
        return self.difference <= TOLERANCE * self.scale

    def line(self) -> str:
        return (
            f"{self.what}: largest difference {self.difference:.1e} in {self.output}, of numbers up to {self.scale:.3g}"
        )


@dataclass
class Report:
    """What became of every tensor, and how it was checked."""

    model: str
    kind: str  # of FROM: hf, timm or mae
    tensors: int  # that FROM holds, each of them used
    left_out: list[str] = field(default_factory=list)  # our names of what TO has no place for
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the terminal."""
        said = [f"{self.model} of {self.kind}: {self.tensors} tensors read, every one of them used"]
        if self.left_out:
            said.append(f"not written, since the target has no place for them: {listed(self.left_out, limit=1000)}")
        said += [f"note: {note}" for note in self.notes]
        said += [f"checked on random images: {check.line()}" for check in self.checks]
        return said + [f"not checked: {reason}" for reason in self.unchecked]


def convert(source: str | Path, to: Path, target: str, given: Mapping[str, Any] | None = None) -> Report:
    """Write the model at `source` to `to` as `target` (of TARGETS) has it: a folder, for mae a file.

    given: what a MAE .pth leaves open (mae.KEYS). `to` must not be there yet. ConfigError and
    CheckpointError name what cannot be read, what the target cannot express, and a check that failed.
    """
    if target not in TARGETS:
        raise ConfigError(f"--to {target}: must be one of {', '.join(TARGETS)}")
    if to.exists():
        raise ConfigError(f"{to}: is there already; name a new {'file' if target == 'mae' else 'folder'}")
    opened, theirs = open_source(source, given or {})
    report = Report(type(opened.model).__name__, opened.kind, opened.tensors, notes=list(opened.notes))
    draft = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{to.parent}: cannot be made: {error.strerror}; name another place") from None
        left_out, notes = _WRITERS[target](draft, opened)
        report.left_out += left_out
        report.notes += notes
        _check_both(report, opened.model, theirs, draft, target)
        _require_good(report, to)
        os.replace(draft, to)
    except VitscaleError as error:
        raise type(error)(str(error).replace(str(draft), str(to))) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if draft.is_file():
            draft.unlink()
    return report


def open_source(source: str | Path, given: Mapping[str, Any]) -> tuple[Opened, Callable[[], Witness]]:
    """The model at `source`, and how other code opens the same."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        opened = read_mae(path, given)
        return opened, lambda: witnesses.by_mae(path, opened.model)
    for name, value in given.items():
        raise ConfigError(f"{name}={value!r}: is for a MAE .pth, and {source} says its own; leave it out")
    if path.suffix in (".pth", ".pt", ".bin") and not path.exists():
        raise CheckpointError(f"{source}: no such file; name a MAE .pth, a model's folder or a name on the hub")
    folder = locate(source)
    content = read_json(folder / CONFIG)
    if is_timm(content):
        return read_timm(folder), lambda: witnesses.by_timm(folder)
    model = load_model(folder)
    opened = Opened("hf", model, *_processor(folder, model))
    return opened, lambda: _by_transformers(folder, model)


def _processor(folder: Path, model: ViTPreTrainedModel) -> tuple[ViTImageProcessor, int, list[str]]:
    """The folder's processor, or the usual one, with the number of tensors and a note on that."""
    count = sum(len(each.theirs) for each in places([*model.state_dict(), *fixed_positions(model)]))
    if (folder / PROCESSOR).is_file():
        return ViTImageProcessor.from_pretrained(folder), count, []
    content = processor_dict(model.config, (0.5,), (0.5,))
    note = f"FROM has no {PROCESSOR}: images are taken to be resized and normalized by 0.5 and 0.5"
    return ViTImageProcessor.from_dict(content), count, [note]


def _write_hf(folder: Path, opened: Opened) -> tuple[list[str], list[str]]:
    beyond = opened.model.config.beyond_transformers
    if beyond:
        values = [f"{key}={getattr(opened.model.config, key)!r}" for key in beyond]
        raise ConfigError(f"{', '.join(values)}: {_TRANSFORMERS_HAS}")
    notes = []
    if isinstance(opened.model, ViTForMultitaskPreTraining):
        notes.append("transformers has no such class: its ViTForImageClassification takes all but the decoder")
    _write_ours(folder, opened)
    return [], notes


def _write_ours(folder: Path, opened: Opened) -> tuple[list[str], list[str]]:
    model = opened.model
    tensors = {**model.state_dict(), **fixed_positions(model)}
    others = {PROCESSOR: opened.processor.to_dict()}
    write_model(folder, type(model).__name__, model.config, tensors, MAX_SHARD_SIZE, others)
    return [], []


_WRITERS: dict[str, Callable[[Path, Opened], tuple[list[str], list[str]]]] = {
    "hf": _write_hf,
    "timm": timm.write_timm,
    "mae": mae.write_mae,
    "vitscale": _write_ours,
}


def _check_both(
    report: Report, model: ViTPreTrainedModel, theirs: Callable[[], Witness], draft: Path, target: str
) -> None:
    """FROM and TO in the code of their own libraries; TO at least read again here."""
    try:
        _check(report, model, "FROM", theirs)
    except Absent as reason:
        report.unchecked.append(f"FROM: {reason}")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; mend FROM, which its own library must open and run") from None
    try:
        _check(report, model, "TO", lambda: _written(draft, model, target))
    except Absent as reason:
        report.unchecked.append(f"TO by its own library: {reason}")
        _check(report, model, "TO", lambda: _again(draft))


def _written(draft: Path, model: ViTPreTrainedModel, target: str) -> Witness:
    """What was written, as the target's own code opens it."""
    if target == "timm":
        return witnesses.by_timm(draft)
    if target == "mae":
        return witnesses.by_mae(draft, model)
    return _by_transformers(draft, model)


def _again(draft: Path) -> Witness:
    """What was written, as it is read here."""
    opened, _ = open_source(draft, {})
    return Witness("this library, read again", lambda inputs: witnesses.ours(opened.model, inputs))


def _by_transformers(folder: Path, model: ViTPreTrainedModel) -> Witness:
    if model.config.beyond_transformers:  # nobody else opens it
        return _again(folder)
    return witnesses.by_transformers(folder, model)


def _check(report: Report, model: ViTPreTrainedModel, what: str, open_other: Callable[[], Witness]) -> None:
    """Add to the report how other code's outputs differ from ours; Absent where there is none."""
    witness, inputs = open_other(), witnesses.inputs_for(model)
    what = f"{what} in {witness.name}"
    try:
        theirs = witness.run(inputs)
    except Exception as error:  # of other code, whatever it is
        raise CheckpointError(f"{what}: fails on images of the model's size: {in_a_line(error)}") from None
    report.checks.append(compare(what, witnesses.ours(model, inputs), theirs))


def compare(what: str, ours: Outputs, theirs: Outputs) -> Check:
    """The output, of those that both have, whose difference is largest for its scale."""
    checks = []
    for name in sorted(ours.keys() & theirs.keys(), reverse=True):  # logits, of those that are equally near
        scale = theirs[name].abs().max().item()
        same = ours[name].shape == theirs[name].shape
        difference = (ours[name] - theirs[name]).abs().max().item() if same else float("inf")
        checks.append(Check(what, name, difference, scale))
    return max(checks, key=lambda check: (not check.good, check.difference / (check.scale or 1.0)))


def _require_good(report: Report, to: Path) -> None:
    bad = [check.line() for check in report.checks if not check.good]
    if bad:
        notes = f" ({'; '.join(report.notes)})" if report.notes else ""
        raise CheckpointError(
            f"{to}: is not written, since outputs on random images differ by more than {TOLERANCE:.0e} of their "
            f"scale: {'; '.join(bad)}{notes}"
        )
