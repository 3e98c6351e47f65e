"""`vitscale predict`: the labels of images with their probabilities, as a table, JSON lines or CSV."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from torch import nn

from vitscale.errors import ConfigError, DataError
from vitscale.files.atomic import replaced
from vitscale.inference.images import ImageBatch
from vitscale.inference.model import Loaded
from vitscale.inference.progress import Tally
from vitscale.models.losses import problem_type
from vitscale.text import printable

Label = tuple[str, float]  # its name, and its probability (or, of a regression, its value)
Writer = Callable[[list[str], list[list[Label]]], None]  # of some images' names and labels


class Predictor:
    """The most probable labels of images, or a regression's values.

    Probabilities are the softmax over all labels, or for problem_type=multi_label_classification each label's
    own sigmoid. A regression (problem_type, or num_labels=1 without one) gives every value, in its order.
    """

    def __init__(self, loaded: Loaded, top_k: int = 5) -> None:
        """ConfigError for a model that has nothing to predict with."""
        self._loaded, self._top_k = loaded, top_k
        config, model = loaded.model.config, loaded.model
        if not isinstance(getattr(model, "classifier", None), nn.Linear):
            empty = f" of num_labels={config.num_labels}" if hasattr(model, "classifier") else ""
            raise ConfigError(
                f"{loaded.source}: a {type(model).__name__}{empty} has no classifier to predict with; take a model "
                "that was trained on labels, or `vitscale features` for what this one sees"
            )
        self._names = list((config.id2label or {}).values())
        kind = problem_type(config)
        self.is_regression, self._is_multi_label = kind == "regression", kind == "multi_label_classification"

    @torch.inference_mode()
    def __call__(self, batch: ImageBatch) -> list[list[Label]]:
        """The labels of each image of a batch, the most probable first."""
        if batch.pixel_values is None:
            return []
        logits = self._loaded.model(pixel_values=batch.pixel_values.to(self._loaded.device)).logits.float().cpu()
        self._loaded.require_finite(logits, batch.names)
        if self.is_regression:
            return [list(zip(self._names, row, strict=True)) for row in logits.tolist()]
        probabilities = logits.sigmoid() if self._is_multi_label else logits.softmax(-1)
        scores, places = probabilities.topk(min(self._top_k, len(self._names)))
        rows = zip(places.tolist(), scores.tolist(), strict=True)
        return [[(self._names[i], score) for i, score in zip(*row, strict=True)] for row in rows]


def predict_all(predictor: Predictor, batches: Iterable[ImageBatch], form: str, out: Path | None, tally: Tally) -> None:
    """Predict every batch and write it in `form` (table, jsonl, csv) to `out`, or to stdout as it comes."""
    with _opened(out, keep=lambda: tally.good > 0) as stream:
        write = FORMS[form](stream, predictor.is_regression)
        for batch in batches:
            labels = predictor(batch)
            tally.add(batch)
            write(batch.names, labels)
            stream.flush()


@contextlib.contextmanager
def _opened(out: Path | None, keep: Callable[[], bool]) -> Iterator[TextIO]:
    """stdout, or a file that appears whole, and only where it is to be kept."""
    if out is None:
        yield sys.stdout
        return
    try:
        with replaced(out) as draft:
            with open(draft, "w", encoding="utf-8", newline="") as stream:
                yield stream
            if not keep():
                draft.unlink()
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written: {error.strerror}; name a file in a folder of yours") from None


def _table(stream: TextIO, is_regression: bool) -> Writer:
    """A block an image: its name once, a line a label."""
    width = 0

    def write(names: list[str], labels: list[list[Label]]) -> None:
        nonlocal width
        shown = [printable(name) for name in names]
        width = max([width, *map(len, shown)])
        for name, row in zip(shown, labels, strict=True):
            for place, (label, score) in enumerate(row):
                number = f"{score:12.6g}" if is_regression else f"{100 * score:6.2f} %"
                stream.write(f"{'' if place else name:<{width}}  {number}  {printable(label)}\n")

    return write


def _json_lines(stream: TextIO, is_regression: bool) -> Writer:
    key = "value" if is_regression else "probability"
    has_any_text = (stream.encoding or "").lower().startswith("utf")

    def write(names: list[str], labels: list[list[Label]]) -> None:
        for name, row in zip(names, labels, strict=True):
            content = {"image": name, "predictions": [{"label": label, key: score} for label, score in row]}
            stream.write(json.dumps(content, ensure_ascii=not has_any_text) + "\n")

    return write


def _csv(stream: TextIO, is_regression: bool) -> Writer:
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(["image", "rank", "label", "value" if is_regression else "probability"])

    def write(names: list[str], labels: list[list[Label]]) -> None:
        for name, row in zip(names, labels, strict=True):
            rows.writerows([name, place + 1, label, score] for place, (label, score) in enumerate(row))

    return write


FORMS: dict[str, Callable[[TextIO, bool], Writer]] = {"table": _table, "jsonl": _json_lines, "csv": _csv}
