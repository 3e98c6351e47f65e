"""`vitscale export`: a checkpoint as a model folder, a model as a file for other runtimes, or smaller."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vitscale.errors import ConfigError
from vitscale.inference.command import takes_max_pixels, takes_set
from vitscale.run_folder import DONE

FORMATS = {"hf": "", "onnx": ".onnx", "torch-export": ".pt2"}
QUANTIZERS = {"dynamic": "onnx", "static": "onnx", "int8-weights": "torch-export"}
PRUNABLE = ("heads", "mlp")
ExportRun = Callable[[Path, Path | None], Path]  # a run's or a checkpoint's folder, where to -> the model folder


def register(verb: Callable[..., argparse.ArgumentParser], export_run: ExportRun) -> None:
    """Add the verb `export`. export_run: what makes a model folder of a run's checkpoint."""
    text = "a checkpoint as a model folder; a model as ONNX or torch.export, quantized, pruned"
    added = verb("export", partial(export, export_run=export_run), text)
    added.add_argument(
        "source", metavar="MODEL",
        help="a run's or a model's folder, a file of weights, or a hub name; without --format and --prune a run's "
        "folder or a checkpoint in it",
    )  # fmt: skip
    added.add_argument("--format", choices=tuple(FORMATS), default="hf", help="default: hf, a model folder")
    added.add_argument("--out", default=None, help="default: RUN_FOLDER/model of a checkpoint, else the model's name")
    added.add_argument("--dynamic-size", action="store_true", help="images of any size, 2 whole patches or more a side")
    added.add_argument(
        "--quantize", choices=tuple(QUANTIZERS), default=None,
        help="onnx: dynamic, or static with --calibrate; torch-export: int8-weights (torchao)",
    )  # fmt: skip
    added.add_argument(
        "--prune", nargs=2, action="append", default=[], metavar=("heads|mlp", "FRACTION"),
        help="take this share of the heads or MLP units out of each block; may be given for both",
    )  # fmt: skip
    added.add_argument(
        "--calibrate", nargs="+", default=[], metavar="IMAGES",
        help="files, folders, patterns or shards to quantize or prune by; 256 of them are used",
    )  # fmt: skip
    added.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGES",
        help="what to compare with fp32 on (default: those of --calibrate, else random numbers)",
    )  # fmt: skip
    takes_set(added)
    takes_max_pixels(added)
    added.add_argument(
        "--labelled", action="store_true",
        help="the images have labels (.cls in shards, else a folder a class): show the accuracy, prune by the loss",
    )  # fmt: skip


def export(arguments: argparse.Namespace, export_run: ExportRun) -> int:
    """Export, print what came out, and where it lies."""
    prunings = _prunings(arguments)
    if arguments.quantize is not None and QUANTIZERS[arguments.quantize] != arguments.format:
        raise ConfigError(
            f"--quantize {arguments.quantize}: is for --format {QUANTIZERS[arguments.quantize]}, not {arguments.format}"
        )
    if arguments.format == "hf" and not prunings:
        _refuse(arguments, "dynamic_size", "calibrate", "images", "labelled", "take")
        print(export_run(Path(arguments.source), Path(arguments.out) if arguments.out else None))
        return DONE
    _check(arguments, prunings)
    from vitscale.export.model import Export

    out = _out(arguments, bool(prunings))
    Export(arguments, prunings, out).run()
    print(out)
    return DONE


def _prunings(arguments: argparse.Namespace) -> dict[str, float]:
    prunings: dict[str, float] = {}
    for what, text in arguments.prune:
        try:
            fraction = float(text)
        except ValueError:
            fraction = 0.0
        if what not in PRUNABLE or not 0 < fraction < 1:
            raise ConfigError(f"--prune {what} {text}: must be heads or mlp, and a number between 0 and 1")
        if what in prunings:
            raise ConfigError(f"--prune {what}: is given twice; name the whole fraction once")
        prunings[what] = fraction
    return prunings


def _check(arguments: argparse.Namespace, prunings: dict[str, float]) -> None:
    if arguments.format == "hf":
        _refuse(arguments, "dynamic_size")
    if arguments.quantize == "static" and not arguments.calibrate:
        raise ConfigError(
            "--quantize static: needs --calibrate IMAGES (100 or more like those it will see), whose ranges fix its "
            "scales; or take --quantize dynamic"
        )
    if arguments.calibrate and arguments.quantize != "static" and not (prunings and arguments.labelled):
        raise ConfigError(
            "--calibrate: is for --quantize static, and for --prune with --labelled; to compare on images name them "
            "as --images"
        )
    if arguments.labelled and not (arguments.images or arguments.calibrate):
        raise ConfigError("--labelled: says that images have labels; name them as --images")
    if arguments.format == "onnx":
        _require_onnx()


def _require_onnx() -> None:
    """ConfigError if a library that --format onnx needs is not there, or does not import."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except Exception as error:  # of a broken installation, whatever it is
            reason = " ".join(str(error).split())
            raise ConfigError(f"--format onnx: needs {name} ({reason}); pip install 'vitscale[export]'") from None


def _refuse(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name):
            other = "" if name == "dynamic_size" else ", or for --prune"
            raise ConfigError(f"--{name.replace('_', '-')}: is for --format onnx or torch-export{other}")


def _out(arguments: argparse.Namespace, pruned: bool) -> Path:
    """The file or folder to make; by default in this folder, by the model's name and what is done to it."""
    if arguments.out:
        out = Path(arguments.out)
    else:
        parts = [Path(arguments.source).resolve().name, *(["pruned"] if pruned else []), arguments.quantize]
        out = Path("-".join(filter(None, parts)) + FORMATS[arguments.format])
    if arguments.format == "hf" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not an empty folder; name a new one for the pruned model")
    if arguments.format != "hf" and (out.suffix != FORMATS[arguments.format] or out.is_dir()):
        raise ConfigError(f"--out {out}: must be the name of a file that ends in {FORMATS[arguments.format]}")
    return out
