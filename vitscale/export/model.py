"""A model as a file that runs without this package, or as a smaller model folder: made, compared, then kept."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitscale.config.model_rules import pair
from vitscale.errors import ConfigError
from vitscale.export.agreement import Labelled, Runner, Variant, as_table, compare, latencies
from vitscale.export.images import Images
from vitscale.export.prune import magnitudes, opens_in, prune, taylor
from vitscale.export.served import Served, trace
from vitscale.files.atomic import staged
from vitscale.files.model_folder import CONFIG, PROCESSOR
from vitscale.inference.model import load
from vitscale.interop.pretrained import load_model, save_pretrained
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.losses import problem_type
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

MOST_CALIBRATION = 256  # images; more change the ranges little
RANDOM_BATCHES = (1, 3, 4)


class Export:
    """One command being carried out: `run` leaves the file or folder at `out`, or nothing."""

    def __init__(self, arguments: argparse.Namespace, prunings: Mapping[str, float], out: Path) -> None:
        """arguments: those of the verb (see command.py), checked; prunings: of heads or mlp, the fraction to go."""
        self._arguments, self._prunings, self._out = arguments, prunings, out
        runs_images = bool(arguments.images or arguments.calibrate)
        loaded = load(arguments.source, "cpu", runs_images, arguments.take)
        self._model, self._processor = loaded.model, loaded.processor
        served = self._served(self._model)
        chooses = served.num_labels and problem_type(self._model.config) == "single_label_classification"
        if arguments.labelled and not chooses:
            raise ConfigError(
                f"--labelled: {arguments.source} is a {type(self._model).__name__} of problem_type="
                f"{self._model.config.problem_type}; labels are for models that choose one of num_labels classes"
            )
        self._images = self._named(arguments.images, "--images", None)
        self._calibration = self._named(arguments.calibrate, "--calibrate", MOST_CALIBRATION)
        self._variants = [Variant("fp32", _runner(served), served.bytes)]

    def run(self) -> None:
        """CheckpointError, and nothing is left, where the result is not what it was made from."""
        compare(self._variants, [next(self._random_batches())])  # before minutes are spent on a broken model
        model = self._pruned()
        with _kept(self._out) as target:
            if self._arguments.format == "hf":
                self._save(model, target)
                self._measure()
                _say(f"the folder opens in {opens_in(model.config)}")
            elif self._arguments.format == "onnx":
                self._onnx(model, target)
            else:
                self._torch_export(model, target)

    def _pruned(self) -> ViTPreTrainedModel:
        model, labelled = self._model, None
        if self._arguments.labelled and self._prunings:
            labelled = self._calibration or self._named(self._arguments.images, "--images", MOST_CALIBRATION)
        for what, fraction in self._prunings.items():
            if labelled is None:
                _say(f"prune {what} {fraction:g}: by the weights' magnitude")
                scores = magnitudes(model, what)
            else:
                _say(f"prune {what} {fraction:g}: by the loss of {len(labelled)} labelled images")
                scores = taylor(model, what, labelled)
            model = prune(model, what, fraction, scores)
        if self._prunings:
            served = self._served(model)
            self._variants.append(Variant("pruned", _runner(served), served.bytes))
        return model

    def _save(self, model: ViTPreTrainedModel, target: Path) -> None:
        save_pretrained(model, target, processor=self._processor)
        again = self._served(load_model(target))
        name = "folder" if isinstance(model, (ViTModel, ViTForImageClassification)) else "folder, its decoder too"
        self._variants.append(Variant(name, _runner(again), _bytes(target), is_exact=True))

    def _onnx(self, model: ViTPreTrainedModel, target: Path) -> None:
        from vitscale.export.onnx import ONE_FILE, open_onnx, quantize_onnx, write_onnx

        served, quantize = self._served(model), self._arguments.quantize
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            exact = target if quantize is None else Path(scratch, "float32.onnx")
            _say("onnx: tracing and translating")
            write_onnx(served, trace(served), exact, self._about(model))
            self._variants.append(Variant("onnx", open_onnx(exact), _bytes(exact), is_exact=True))
            if quantize is not None:
                _say(f"onnx: quantizing ({quantize})")
                calibration = (pixels for pixels, _ in self._calibration) if self._calibration else None
                quantize_onnx(exact, target, calibration, large=served.bytes > ONE_FILE)
                self._variants.append(Variant(f"onnx, int8 {quantize}", open_onnx(target), _bytes(target)))
            self._measure()

    def _torch_export(self, model: ViTPreTrainedModel, target: Path) -> None:
        from vitscale.export.torch_export import int8_weights, open_torch_export, write_torch_export

        served = self._served(model)
        if self._arguments.quantize is not None:
            served = int8_weights(served)
            self._variants.append(Variant("int8 weights", _runner(served), served.bytes))
        _say("torch-export: tracing")
        write_torch_export(trace(served), target, self._about(model))
        opened = open_torch_export(target)
        self._variants.append(Variant("torch-export", opened, _bytes(target), is_exact=True))
        self._measure()

    def _measure(self) -> None:
        """Compare all variants, and print the table."""
        variants = self._variants
        _say(f"comparing {len(variants)}")
        random = self._random_batches()
        agreements = compare(variants, random)
        if (real := self._images or self._calibration) is not None:
            agreements = compare(variants, real)
        served = self._served(self._model)
        times, rounds = latencies([variant.run for variant in variants], served.random_images(1))
        where = f"{agreements[0].images} {'random images' if real is None else 'images'}"
        size = "x".join(map(str, (served.config.num_channels, *pair(served.config.image_size))))
        threads = torch.get_num_threads()
        _say(as_table(variants, agreements, times, served.num_labels > 0))
        _say(f"agreement with fp32 on {where}; latency of one {size} image, median of {rounds}, {threads} threads")

    def _random_batches(self) -> Iterator[Labelled]:
        """Several numbers of images, and several sizes where they may vary."""
        served = self._served(self._model)
        for seed, n in enumerate(RANDOM_BATCHES):
            yield served.random_images(n, seed=seed), None
        if served.dynamic_size:
            for more in ((-1, 0), (3, 1)):
                yield served.random_images(2, more), None

    def _served(self, model: ViTPreTrainedModel) -> Served:
        return Served(model, self._arguments.dynamic_size)

    def _named(self, named: Sequence[str], key: str, most: int | None) -> Images | None:
        if not named:
            return None
        labelled, max_pixels = self._arguments.labelled, self._arguments.max_pixels
        config, processor = self._model.config, self._processor
        return Images(named, key, processor, config, labelled=labelled, most=most, max_pixels=max_pixels)

    def _about(self, model: ViTPreTrainedModel) -> dict[str, Any]:
        """What whoever runs the file wants to know: the labels' names, how pixels are made."""
        return {CONFIG: model.config.to_dict(), PROCESSOR: self._processor.to_dict()}


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _kept(out: Path) -> Iterator[Path]:
    """A path to write to; what is there at the end takes the place of `out`, after an error nothing does."""
    try:
        with staged(out.parent, last=out.name) as folder:
            yield folder / out.name
            for beside in () if out.is_dir() else out.parent.glob(f"{out.name}.data"):  # of a larger model before
                if not (folder / beside.name).exists():
                    beside.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}; name another place") from None


def _runner(served: Served) -> Runner:
    return torch.no_grad()(partial(served))


def _bytes(path: Path) -> int:
    """Of a file and the weights beside it, or of a folder's weights."""
    files = path.glob("*.safetensors") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_size for file in files)
