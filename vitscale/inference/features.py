"""`vitscale features`: what an encoder makes of images."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vitscale.errors import ConfigError
from vitscale.inference.feature_files import FeatureFolder, Request
from vitscale.inference.images import ImageBatch, ImageSource, batches
from vitscale.inference.model import Loaded
from vitscale.inference.progress import Tally

SHARD_BYTES = 256 << 20  # of a shard whose number of images is not given


class FeatureExtractor:
    """Features of images by an encoder with every patch visible: float32 [n, *shape].

    pool: "cls", the class token; "mean", the mean of the patch tokens; "patch", all of them, [patches, width], row
    by row of the image. They are taken after the encoder's last norm; where that stands behind the pooling
    (fc_norm), the model's own kind of pooling gets it, so that it is what the classifier sees.
    """

    def __init__(self, loaded: Loaded, pool: str) -> None:
        """ConfigError for cls of a model without a class token."""
        model, config = loaded.model, loaded.model.config
        if pool == "cls" and not config.use_cls_token:
            raise ConfigError(f"--pool cls: {loaded.source} has no class token (use_cls_token); take mean or patch")
        self._loaded, self._pool, self._encoder = loaded, pool, model.base_model
        self._norm = getattr(model, "fc_norm", None) if pool == config.pooling else None
        self.shape = [config.num_patches, config.hidden_size] if pool == "patch" else [config.hidden_size]

    @torch.inference_mode()
    def __call__(self, batch: ImageBatch) -> np.ndarray:
        if batch.pixel_values is None:
            return np.empty((0, *self.shape), dtype=np.float32)
        tokens = self._encoder(pixel_values=batch.pixel_values.to(self._loaded.device)).last_hidden_state
        features = tokens[:, 0] if self._pool == "cls" else self._encoder.patch_tokens(tokens)
        features = features.mean(dim=1) if self._pool == "mean" else features
        features = (features if self._norm is None else self._norm(features)).float().cpu()
        self._loaded.require_finite(features, batch.names)
        return features.numpy()


def write_features(
    loaded: Loaded,
    sources: Iterator[ImageSource],
    out: Path,
    tally: Tally,
    *,
    pool: str,
    file_format: str,
    shard_size: int | None,
    batch: int,
    threads: int,
    max_pixels: int,
) -> FeatureFolder:
    """Write the features of every image into the folder `out`, going on where an earlier call stopped.

    shard_size: images a shard; None: as many as SHARD_BYTES hold. Memory is that of some batches, however large a
    shard is. ConfigError where `out` holds something else, DataError where it was begun with other images.
    """
    if file_format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("--format parquet: needs pyarrow (pip install pyarrow), or take npy")
    extract = FeatureExtractor(loaded, pool)
    config = loaded.model.config
    request = Request(
        weights=_digest(loaded.model),
        config=config.to_dict(),
        processor=loaded.processor.to_dict(),
        pool=pool,
        file_format=file_format,
        shape=extract.shape,
        shard_size=shard_size or max(1, SHARD_BYTES // (4 * math.prod(extract.shape))),
    )
    folder = FeatureFolder(out, request)
    rest = folder.go_on(sources, tally)

    def features() -> Iterator[tuple[ImageBatch, np.ndarray]]:
        for each in batches(rest, loaded.processor, config.num_channels, batch, threads, max_pixels):
            yield each, extract(each)
            tally.add(each)

    folder.write(features())
    return folder


def _digest(model: nn.Module) -> str:
    """A hash of all weights: what tells one model from another, whatever its folder is called."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        hashed.update(name.encode())
        hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()
