"""A model folder as MLflow's python_function: what `mlflow models serve` runs (it looks for `_load_pyfunc`)."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from vitscale.errors import DataError
from vitscale.inference.features import FeatureExtractor
from vitscale.inference.images import ImageSource, batches
from vitscale.inference.model import Loaded, load
from vitscale.inference.predict import Predictor

_BATCH, _THREADS = 32, 4


def _load_pyfunc(path: str) -> Served:
    return Served(load(path, None))


class Served:
    """Labels of images or, of a model without a classifier, their features."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded, self._extract = loaded, FeatureExtractor(loaded, "mean")
        self._predictor = Predictor(loaded) if hasattr(loaded.model, "classifier") else None

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[Any]:
        """model_input: a table whose column `image` holds encoded images (JPEG, PNG, ...), as bytes or as base64 text.

        Of each image a list of {label, probability} (of a regression {label, value}), or of {features: [width]}, the
        mean over its patch tokens. DataError for what is no image.
        """
        sources = [
            ImageSource(f"image {number}", partial(_encoded, value))
            for number, value in enumerate(model_input["image"])
        ]
        answers: list[Any] = []
        loaded = self._loaded
        for batch in batches(sources, loaded.processor, loaded.model.config.num_channels, _BATCH, _THREADS):
            for entry in batch.entries:
                if entry.bad is not None:
                    raise DataError(f"{entry.name}: {entry.bad}")
            if self._predictor is not None:
                key = "value" if self._predictor.is_regression else "probability"
                answers += [[{"label": name, key: score} for name, score in row] for row in self._predictor(batch)]
            else:
                answers += [{"features": row} for row in self._extract(batch).tolist()]
        return answers


def _encoded(value: bytes | str) -> bytes:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else bytes(value)
    except ValueError:
        raise DataError("is not base64") from None
