"""How many optimizer steps a run takes, before its shards are opened."""

from __future__ import annotations

import numpy as np

from vitscale.config.schema import RunConfig
from vitscale.config.step import total_steps
from vitscale.data.mixture import is_mixture, training_order
from vitscale.errors import ConfigError, DataError

_IMAGES = "give --images N, the size of the data set, since the config says epochs"
_REPEATED = "sources of data.train come a number of times each, of which epochs cannot be told: set train.steps"


def steps_or_missing(config: RunConfig, images: int | None) -> int | str:
    """What the run's own order comes to once the shards are counted, or what is missing to tell. images: of all of
    data.train, of which data.fraction and data.validation_fraction are taken to choose their very shares."""
    train, data = config.train, config.data
    if train.steps is not None:
        return train.steps
    if data.epoch_samples is not None:
        return total_steps(config, max(1, data.epoch_samples // train.global_batch))
    if images is None:
        return _IMAGES
    sources = len(data.train) if is_mixture(data.train) else 1
    if sources > 1 and len({source.repeat for source in data.train}) > 1:
        return _REPEATED
    trained = round(images * (1 - data.validation_fraction) * data.fraction)
    # Only how many there are counts, not in which shards: one a source stands for all.
    counts = np.array([trained // sources + (number < trained % sources) for number in range(sources)])
    try:
        return total_steps(config, training_order(config, counts, [1] * sources).batches_per_epoch)
    except DataError as error:
        raise ConfigError(f"--images {images}: {error}") from None
