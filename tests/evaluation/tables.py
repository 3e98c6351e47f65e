"""Tables of features in memory of tests, on one rank or on several in threads."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from vitscale.engine.ranks import ProcessRanks
from vitscale.evaluation.features import FeatureTable

CPU = torch.device("cpu")


def sole() -> ProcessRanks:
    return ProcessRanks(timedelta(seconds=10))


def table(folder: Path, labels: np.ndarray, first: int = 0, **poolings: np.ndarray) -> FeatureTable:
    """Rows with the ids first, first + 1, ..., appended in two parts."""
    made = FeatureTable(folder, len(labels))
    for rows in np.array_split(np.arange(len(labels)), 2):
        values = {name: torch.from_numpy(each[rows].astype(np.float32)) for name, each in poolings.items()}
        made.append(first + rows, labels[rows], values)
    return made


def clouds(
    n: int, classes: int = 4, width: int = 16, noise: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Features (of values that float16 has) around a centre for each class, and the classes."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(9).normal(size=(classes, width)) * 2
    labels = random.integers(0, classes, n)
    return (centers[labels] + noise * random.normal(size=(n, width))).astype(np.float16), labels
