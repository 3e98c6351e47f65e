"""A model as a file that runs without this package, or as a smaller model folder: made, compared, then kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitscale.config.model_rules import pair
from vitscale.errors import ConfigError
from vitscale.export.agreement import Labelled, Row, Runner, Variant, as_table, compare, latencies
from vitscale.export.images import Images
from vitscale.export.prune import magnitudes, opens_in, prune, taylor
from vitscale.export.served import Served, trace
from vitscale.files.model_folder import CONFIG, PROCESSOR
from vitscale.files.sources import locate
from vitscale.inference.model import load
from vitscale.interop.auto import AutoImageProcessor
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.pretrained import load_model, write_model
from vitscale.interop.weight_files import MAX_SHARD_SIZE
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.losses import problem_type
from vitscale.models.positions import fixed_positions
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

MOST_CALIBRATION = 256  # images; more change the ranges little
RANDOM_BATCHES = (1, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `vitscale export` was asked for, beyond a checkpoint's model folder."""

    source: str
    format: str  # hf, onnx or torch-export
    out: Path
    dynamic_size: bool = False
    quantize: str | None = None  # dynamic or static (onnx), int8-weights (torch-export)
    prunings: Sequence[tuple[str, float]] = ()  # heads or mlp, and the fraction to go
    images: Sequence[str] = ()  # to compare on
    calibrate: Sequence[str] = ()  # to quantize or prune by
    labelled: bool = False


class Export:
    """One request being carried out: `run` leaves the file or folder at request.out, or nothing."""

    def __init__(self, request: Request, say: Callable[[str], None]) -> None:
        """say: told what is being done, and in the end what came out."""
        self._request, self._say = request, say
        self._folder = locate(request.source)
        self._processor: ViTImageProcessor | None = None
        if request.images or request.calibrate:
            loaded = load(request.source, "cpu")
            self._model, self._processor = loaded.model, loaded.processor
        else:
            self._model = load_model(self._folder)
            if (self._folder / PROCESSOR).is_file():
                self._processor = AutoImageProcessor.from_pretrained(self._folder)
        served = self._served(self._model)
        chooses = served.num_labels and problem_type(self._model.config) == "single_label_classification"
        if request.labelled and not chooses:
            raise ConfigError(
                f"--labelled: {request.source} is a {type(self._model).__name__} of problem_type="
                f"{self._model.config.problem_type}; labels are for models that choose one of num_labels classes"
            )
        self._images = self._named(request.images, "--images", None)
        self._calibration = self._named(request.calibrate, "--calibrate", MOST_CALIBRATION)
        self._variants = [Variant("fp32", _runner(served), served.bytes)]

    def run(self) -> None:
        """CheckpointError, and nothing is left, where the result is not what it was made from."""
        request = self._request
        compare(self._variants, [next(self._random_batches())])  # before minutes are spent on a broken model
        model = self._pruned()
        with _kept(request.out) as target:
            if request.format == "hf":
                self._save(model, target)
                self._measure()
                self._say(f"the folder opens in {opens_in(model.config)}")
            elif request.format == "onnx":
                self._onnx(model, target)
            else:
                self._torch_export(model, target)

    def _pruned(self) -> ViTPreTrainedModel:
        model = self._model
        for what, fraction in self._request.prunings:
            labelled = self._labelled()
            if labelled is None:
                self._say(f"prune {what} {fraction:g}: by the weights' magnitude")
                scores = magnitudes(model, what)
            else:
                self._say(f"prune {what} {fraction:g}: by the loss of {len(labelled)} labelled images")
                scores = taylor(model, what, labelled)
            model = prune(model, what, fraction, scores)
        if self._request.prunings:
            served = self._served(model)
            self._variants.append(Variant("pruned", _runner(served), served.bytes))
        return model

    def _labelled(self) -> Images | None:
        """What decides which heads and units go, where anything but their weights does."""
        if not self._request.labelled:
            return None
        return self._calibration or self._named(self._request.images, "--images", MOST_CALIBRATION)

    def _save(self, model: ViTPreTrainedModel, target: Path) -> None:
        tensors = {**model.state_dict(), **fixed_positions(model)}
        write_model(target, type(model).__name__, model.config, tensors, MAX_SHARD_SIZE, self._processor_file())
        again = self._served(load_model(target))
        name = "folder" if isinstance(model, (ViTModel, ViTForImageClassification)) else "folder, its decoder too"
        self._variants.append(Variant(name, _runner(again), _bytes(target), same_as=len(self._variants) - 1))

    def _onnx(self, model: ViTPreTrainedModel, target: Path) -> None:
        from vitscale.export.onnx import ONE_FILE, describe, open_onnx, write_onnx
        from vitscale.export.quantize import quantize_onnx

        served, quantize = self._served(model), self._request.quantize
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            exact = target if quantize is None else Path(scratch, "float32.onnx")
            self._say("onnx: tracing and translating")
            write_onnx(served, trace(served), exact)
            describe(exact, self._about(model))
            self._variants.append(Variant("onnx", open_onnx(exact), _bytes(exact), same_as=len(self._variants) - 1))
            if quantize is not None:
                self._say(f"onnx: quantizing ({quantize})")
                calibration = (pixels for pixels, _ in self._calibration) if self._calibration else None
                quantize_onnx(exact, target, calibration, large=served.bytes > ONE_FILE)
                self._variants.append(Variant(f"onnx, int8 {quantize}", open_onnx(target), _bytes(target)))
            self._measure()

    def _torch_export(self, model: ViTPreTrainedModel, target: Path) -> None:
        from vitscale.export.torch_export import int8_weights, open_torch_export, write_torch_export

        served = self._served(model)
        if self._request.quantize is not None:
            served = int8_weights(served)
            self._variants.append(Variant("int8 weights", _runner(served), served.bytes))
        self._say("torch-export: tracing")
        write_torch_export(trace(served), target, self._about(model))
        opened = open_torch_export(target)
        self._variants.append(Variant("torch-export", opened, _bytes(target), same_as=len(self._variants) - 1))
        self._measure()

    def _measure(self) -> None:
        """Compare all variants, and print the table."""
        variants = self._variants
        self._say(f"comparing {len(variants)}")
        random = self._random_batches()
        agreements = compare(variants, random)
        if (real := self._images or self._calibration) is not None:
            agreements = compare(variants, real)
        served = self._served(self._model)
        times, rounds = latencies([variant.run for variant in variants], served.random_images(1))
        rows = [Row(v.name, v.bytes, time, a) for v, time, a in zip(variants, times, agreements, strict=True)]
        where = f"{agreements[0].images} {'random images' if real is None else 'images'}"
        size = "x".join(map(str, (served.config.num_channels, *pair(served.config.image_size))))
        threads = torch.get_num_threads()
        self._say(as_table(rows, served.num_labels > 0))
        self._say(f"agreement with fp32 on {where}; latency of one {size} image, median of {rounds}, {threads} threads")

    def _random_batches(self) -> Iterator[Labelled]:
        """Several numbers of images, and several sizes where they may vary."""
        served = self._served(self._model)
        for seed, n in enumerate(RANDOM_BATCHES):
            yield served.random_images(n, seed=seed), None
        if served.dynamic_size:
            for more in ((-1, 0), (3, 1)):
                yield served.random_images(2, more), None

    def _served(self, model: ViTPreTrainedModel) -> Served:
        return Served(model, self._request.dynamic_size)

    def _named(self, named: Sequence[str], key: str, most: int | None) -> Images | None:
        if not named:
            return None
        assert self._processor is not None
        return Images(named, key, self._processor, self._model.config, labelled=self._request.labelled, most=most)

    def _about(self, model: ViTPreTrainedModel) -> dict[str, Any]:
        """What whoever runs the file wants to know: the labels' names, how pixels are made."""
        return {CONFIG: model.config.to_dict(), **self._processor_file()}

    def _processor_file(self) -> dict[str, dict[str, Any]]:
        """Its name and content, where the model came with a processor."""
        return {} if self._processor is None else {PROCESSOR: self._processor.to_dict()}


@contextmanager
def _kept(out: Path) -> Iterator[Path]:
    """A path to write to; what is there at the end takes the place of `out`, after an error nothing does."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}; name a place of your own") from None
    try:
        yield scratch / out.name
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == out.name):  # weights beside it first
            os.replace(path, out.with_name(path.name))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}; name another place") from None
    finally:
        shutil.rmtree(scratch)


def _runner(served: Served) -> Runner:
    return torch.no_grad()(partial(served))


def _bytes(path: Path) -> int:
    """Of a file and the weights beside it, or of a folder's weights."""
    found = path.glob("*.safetensors") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(each.stat().st_size for each in found)
