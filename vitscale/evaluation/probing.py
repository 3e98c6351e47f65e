"""Probes of a run's encoder between its steps: labelled images through it on all ranks, the scores on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscale.augment.feed import DeviceFeed, FedBatch
from vitscale.augment.pipeline import Augment
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig
from vitscale.data.crop import evaluation_crop
from vitscale.data.labels import LabelReader
from vitscale.data.loader import Loader
from vitscale.engine.whole import Evaluable
from vitscale.evaluation.features import Encode, FeatureTable, of_vit
from vitscale.evaluation.figures import (
    SHOWN,
    draw_neighbours,
    draw_patches,
    draw_reconstructions,
    features_of,
    reconstruct,
)  # fmt: skip
from vitscale.evaluation.frozen import frozen_scores
from vitscale.evaluation.validation import HeldOut
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.simmim import MaskedImageModel
from vitscale.models.vit import ViTModel
from vitscale.world import World

Scores = dict[str, float]
_COLLAPSED = 2.0  # effective rank below which features say next to nothing


class Probing:
    """evaluation.train and evaluation.test, or a part of them that is small enough, scored by frozen features."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        train: HeldOut | None,
        test: HeldOut | None,
        scratch: Path,
        most: int | None = None,
    ) -> None:
        """train: None where pictures are drawn and no features scored; scratch: a folder for features, which leave no
        file; most: images of each side, the same ones every time, chosen by a hash of their keys (None: all)."""
        self._config, self._world, self._scratch = config, world, scratch
        label = config.data.label_extension
        self.train, self.test = (
            side if side is None or most is None else side.at_most(most, label) for side in (train, test)
        )

    def scores(self, model: Evaluable, encode: Callable[[Any], Encode]) -> Scores:
        """Of the encoder that `encode` makes of the plain module (its moving average in training, where there is one);
        the same on every rank. A collective."""
        train, test = self.tables(model, encode)
        return self.scores_of(model, train, test, train.poolings)

    def tables(self, model: Evaluable, encode: Callable[[Any], Encode]) -> tuple[FeatureTable, FeatureTable | None]:
        """This rank's features of both sides, of the labelled images that can be read. A collective."""
        assert self.train is not None
        train = self._table(model, encode, self.train)
        return train, None if self.test is None else self._table(model, encode, self.test)

    def scores_of(
        self,
        model: Evaluable,
        train: FeatureTable,
        test: FeatureTable | None,
        poolings: Sequence[str],
        shots: Sequence[int] = (),
    ) -> Scores:
        """Of some poolings of these tables. A collective."""
        return frozen_scores(train, test, poolings, self._config.evaluation, model.ranks, model.device, shots)

    def _table(self, model: Evaluable, encode: Callable[[Any], Encode], side: HeldOut) -> FeatureTable:
        batch, order = self._batch(side), side.order(self._batch(side))
        micro = batch // self._world.world_size
        table = FeatureTable(self._scratch, order.batches_per_epoch * micro)

        def keep(output: Mapping[str, Tensor], fed: FedBatch) -> dict[str, Tensor]:
            labels, chosen = fed.inputs["labels"].cpu().numpy(), fed.repeats == 0  # not what fills up the last batch
            for each in fed.replaced:  # another image stands there, which is counted in its own place
                slot = each.slot - self._world.rank * micro
                table.bad[each.cause] += int(chosen[slot])
                chosen[slot] = False
            table.unlabelled += int((chosen & (labels < 0)).sum())
            chosen &= labels >= 0
            rows = torch.from_numpy(np.flatnonzero(chosen)).to(model.device)
            table.append(fed.sample_ids[chosen], labels[chosen], {name: value[rows] for name, value in output.items()})
            return {}

        with self._feed(side, model.device) as feed:
            model.evaluate(feed, order.batches_per_epoch, keep, forward=_of_pixels(encode))
        return table

    def draw(self, model: Evaluable, folder: Path, title: str) -> None:
        """What the model makes of the first held-out images, as PNGs of rank 0: reconstructions of hidden patches where
        its objective hides some, nearest neighbours, patches in colours. A collective."""
        config = self._config
        mean, std = config.augment.mean, config.augment.std

        def forward(module: Any, batch: FedBatch) -> None:
            pixel_values, labels, keys = (batch.inputs[name] for name in ("pixel_values", "labels", "sample_key"))
            made = features_of(encoder_in(module), pixel_values, labels, mean, std)
            panels = reconstruct(module, pixel_values[:SHOWN], keys[:SHOWN], mean, std) if _hides(module) else None
            if self._world.is_main:
                draw_neighbours(made, folder / "neighbours.png", title)
                draw_patches(made, folder / "patches.png", title)
            if self._world.is_main and panels is not None:
                draw_reconstructions(panels, folder / "reconstructions.png", title)

        side = self.test or self.train
        assert side is not None
        with self._feed(side, model.device) as feed:
            model.evaluate(feed, 1, lambda output, batch: {}, forward=forward)

    def _batch(self, side: HeldOut) -> int:
        ranks = self._world.world_size
        return min(self._config.evaluation.batch, -(-side.total // ranks)) * ranks

    def _feed(self, side: HeldOut, device: torch.device) -> Any:
        return _Feed(self._loader(side), self._augment(str(device)), device)

    def _loader(self, side: HeldOut) -> Loader:
        config, size, batch = self._config, pair(self._config.model.image_size), self._batch(side)
        return Loader(
            index=side.index,
            order=side.order(batch),
            crop=evaluation_crop(config.evaluation.crop_fraction, size),
            data=config.data,
            num_channels=config.model.num_channels,
            seed=config.run.seed,
            world=self._world,
            global_batch=batch,
            micro_batch=batch // self._world.world_size,
            start=0,
            labels=LabelReader(path=config.data.label_path, names=config.model.id2label or side.class_names),
            image_size=size,
        )

    def _augment(self, device: str) -> Augment:
        config = self._config
        return Augment(
            config.augment, pair(config.model.image_size), config.model.num_channels, device, train=False, labels=True
        )


class _Feed(DeviceFeed[Any]):
    """A feed that closes its loader."""

    def __init__(self, loader: Loader, augment: Augment, device: torch.device) -> None:
        super().__init__(loader, augment, device)
        self._own = loader

    def close(self) -> None:
        super().close()
        self._own.close()


def _of_pixels(encode: Callable[[Any], Encode]) -> Callable[[Any, FedBatch], Mapping[str, Tensor]]:
    return lambda module, batch: encode(module)(batch.inputs["pixel_values"])


def encoder_in(model: Any) -> ViTModel:
    """The encoder in a model of any class, or the model itself."""
    return model if isinstance(model, ViTModel) else model.vit


def encoder_of(model: Any) -> Encode:
    """The features of a model of any class."""
    return of_vit(encoder_in(model))


def _hides(model: Any) -> bool:
    return isinstance(model, (ViTMAEForPreTraining, MaskedImageModel))


def warnings_of(scores: Scores, baselines: Mapping[str, Scores]) -> list[str]:
    """What is wrong with an encoder's scores, with the likely reasons."""
    lines = []
    for name, baseline in baselines.items():
        below = [kind for kind in ("linear_probe", "knn") if scores[kind] < baseline[kind]]
        if below:
            told = ", ".join(f"{kind} {scores[kind]:.3f} (there {baseline[kind]:.3f})" for kind in below)
            lines.append(
                f"features are worse than {name}: {told}; early in a run this passes; later look at optimizer.lr, "
                "the augmentation, and whether images and labels belong together"
            )
    # A large mean alone makes the rank small too: features that tell classes apart have not collapsed.
    tell_nothing = all(scores["linear_probe"] < baseline["linear_probe"] for baseline in baselines.values())
    if scores["rankme"] < _COLLAPSED and tell_nothing:
        lines.append(
            f"features have collapsed: rankme {scores['rankme']:.3g}; lower optimizer.lr, lengthen optimizer.warmup, "
            "or look for images that are all alike"
        )
    return lines
