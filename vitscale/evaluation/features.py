"""Frozen features of labelled images: what makes them, and a table of those that this rank has made."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.models.vit import ViTModel

Encode = Callable[[Tensor], Mapping[str, Tensor]]  # normalised [n, channels, height, width] -> [n, width] by pooling
_LARGEST = 65504.0  # of float16
_ON_DEVICE = 0.25  # of a GPU's free memory may hold features


class FeatureTable:
    """Features by pooling, float16, with the labels and ids of their images: this rank's rows.

    They lie in memory-mapped files without a name in `folder`, so that ImageNet's need no memory, and a kill leaves
    nothing behind.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        """capacity: the most images that this rank will have."""
        self._folder, self._capacity, self._rows = folder, capacity, 0
        self._ids, self._labels = (np.empty(capacity, np.int64) for _ in range(2))
        self._values: dict[str, np.ndarray] = {}
        self._resident: dict[str, Tensor] = {}
        self.bad: Counter[str] = Counter()  # images that could not be read, by cause
        self.unlabelled = 0  # images without a label that can be read

    def append(self, ids: np.ndarray, labels: np.ndarray, values: Mapping[str, Tensor]) -> None:
        """ids, labels: int64 [n]; values: by pooling [n, width], on any device."""
        rows = slice(self._rows, self._rows + len(ids))
        self._ids[rows], self._labels[rows] = ids, labels
        for name, value in values.items():
            if name not in self._values:
                self._values[name] = self._mapped(value.shape[1])
            self._values[name][rows] = value.float().nan_to_num(0.0).clamp(-_LARGEST, _LARGEST).cpu().numpy()
        self._rows = rows.stop

    def _mapped(self, width: int) -> np.ndarray:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            return np.memmap(file, np.float16, "w+", shape=(max(1, self._capacity), width))

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self._rows]

    @property
    def labels(self) -> np.ndarray:
        return self._labels[: self._rows]

    @property
    def poolings(self) -> tuple[str, ...]:
        return tuple(self._values)

    def __len__(self) -> int:
        return self._rows

    def rows(self, pooling: str, where: np.ndarray | slice = slice(None)) -> np.ndarray:
        """float16 [n, width]"""
        return self._values[pooling][: self._rows][where]

    def chunks(self, pooling: str, device: torch.device, size: int = 8192) -> Iterator[tuple[slice, Tensor]]:
        """All rows in parts: (which, float32 on `device`). A GPU keeps them where they are few enough."""
        values = self.rows(pooling)
        if pooling not in self._resident and values.nbytes < _spare(device):
            self._resident[pooling] = torch.from_numpy(np.array(values)).to(device)
        for first in range(0, len(values), size):
            rows = slice(first, min(first + size, len(values)))
            if pooling in self._resident:
                yield rows, self._resident[pooling][rows].float()
            else:
                yield rows, torch.from_numpy(values[rows].astype(np.float32)).to(device)


def _spare(device: torch.device) -> float:
    """Bytes of a GPU's memory that features may take."""
    return _ON_DEVICE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0.0


def of_vit(vit: ViTModel) -> Encode:
    """Mean of the patch tokens and, where there is one, the class token, with every patch visible."""

    def encode(pixel_values: Tensor) -> dict[str, Tensor]:
        tokens = vit(pixel_values=pixel_values).last_hidden_state
        cls = {"cls": tokens[:, 0]} if vit.config.use_cls_token else {}
        return {"mean": vit.patch_tokens(tokens).mean(dim=1), **cls}

    return encode


def pixels(pixel_values: Tensor, most: int = 1024) -> dict[str, Tensor]:
    """The pixels themselves, averaged down to a square of at most `most` numbers: what an encoder has to beat."""
    channels, height, width = pixel_values.shape[-3:]
    side = max(1, math.isqrt(most // channels))
    if max(height, width) > side:
        pixel_values = F.adaptive_avg_pool2d(pixel_values, (min(side, height), min(side, width)))
    return {"pixels": pixel_values.flatten(1)}
