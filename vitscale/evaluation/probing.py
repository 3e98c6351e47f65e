"""Probes of a run's encoder between its steps: labelled images through it on all ranks, the scores on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscale.augment.feed import DeviceFeed, FedBatch
from vitscale.augment.pipeline import Augment
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig
from vitscale.data.crop import CenterCrop
from vitscale.data.labels import LabelReader
from vitscale.data.loader import Loader
from vitscale.data.subset import chosen_by_hash
from vitscale.engine.engine import Engine
from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import DataError
from vitscale.evaluation.features import pixels
from vitscale.evaluation.figures import SHOWN, Reconstructions, reconstruct
from vitscale.evaluation.frozen import frozen_scores
from vitscale.evaluation.validation import HeldOut
from vitscale.models.vit import ViTModel
from vitscale.world import World

Encode = Callable[[Tensor], Mapping[str, Tensor]]  # pixel_values -> features by pooling, each [n, width]
Scores = dict[str, float]
_COLLAPSED = {"feature_deviation": 0.05, "rankme": 2.0}  # below these features say next to nothing


class Probing:
    """evaluation.train and evaluation.test, or a part of them that is small enough, scored by frozen features."""

    def __init__(self, config: RunConfig, world: World, train: HeldOut, test: HeldOut) -> None:
        """Of each at most evaluation.images, the same ones every time, chosen by a hash of their keys."""
        self._config, self._world = config, world
        self._sides = [self._capped(side) for side in (train, test)]

    def _capped(self, side: HeldOut) -> HeldOut:
        most = self._config.evaluation.images
        if side.total <= most:
            return side
        return HeldOut(side.index, chosen_by_hash(side.index, self._config.data.label_extension, most / side.total))

    def of_engine(self, engine: Engine) -> Scores:
        """The encoder in training (its moving average where there is one). A collective; the same on every rank."""

        def features(side: HeldOut) -> list[Any]:
            kept: list[Any] = []
            with self._feed(side, engine.device) as feed:
                engine.evaluate(
                    feed,
                    side.order(self._batch(side)).batches_per_epoch,
                    lambda output, batch: self._keep(kept, output, batch),
                    forward=lambda model, batch: of_vit(model.vit)(batch.inputs["pixel_values"]),
                )
            return kept

        return self._scores(engine.ranks, features)

    @torch.no_grad()
    def of_encoder(self, encode: Encode, ranks: ProcessRanks, device: torch.device) -> Scores:
        """Any encoder that every rank holds whole, in evaluation mode on `device`. A collective."""

        def features(side: HeldOut) -> list[Any]:
            kept: list[Any] = []
            with self._feed(side, device) as feed:
                for batch in feed:
                    self._keep(kept, encode(batch.inputs["pixel_values"]), batch)
            return kept

        return self._scores(ranks, features)

    def of_pixels(self, ranks: ProcessRanks, device: torch.device) -> Scores:
        """What the images themselves give, averaged down to 32 pixels a side."""
        encode = pixels()
        return self.of_encoder(lambda pixel_values: {"pixels": encode(pixel_values)}, ranks, device)

    def reconstructions(self, engine: Engine) -> Reconstructions:
        """What the model in training makes of hidden patches of the first test images. A collective."""
        config, panels = self._config, list[Reconstructions]()

        def forward(model: Any, batch: FedBatch) -> None:
            images, keys = (batch.inputs[name][:SHOWN] for name in ("pixel_values", "sample_key"))
            panels.append(reconstruct(model, images, keys, config.augment.mean, config.augment.std))

        with self._feed(self._sides[1], engine.device) as feed:
            engine.evaluate(feed, 1, lambda output, batch: {"batches": torch.ones(())}, forward=forward)
        return panels[0]

    def _scores(self, ranks: ProcessRanks, features: Callable[[HeldOut], list[Any]]) -> Scores:
        gathered = [ranks.collect(features(side)) for side in self._sides]
        scores = None
        if ranks.rank == 0:
            (train, train_y), (test, test_y) = (_joined(of_ranks) for of_ranks in gathered)
            scores = frozen_scores(train, train_y, test, test_y, self._config.evaluation.neighbours)
        scores = ranks.gather(scores)[0]
        assert scores is not None
        return scores

    def _keep(self, kept: list[Any], output: Mapping[str, Tensor], batch: FedBatch) -> dict[str, Tensor]:
        """The features of images that were not here before, as float16."""
        chosen = (batch.repeats == 0) & (batch.inputs["labels"].cpu().numpy() >= 0)
        values = {name: value.float().cpu().numpy()[chosen].astype(np.float16) for name, value in output.items()}
        kept.append((batch.sample_ids[chosen], batch.inputs["labels"].cpu().numpy()[chosen], values))
        return {"images": torch.tensor(float(chosen.sum()))}

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
            crop=CenterCrop(config.evaluation.crop_fraction, size[1] / size[0]),
            data=config.data,
            num_channels=config.model.num_channels,
            seed=config.run.seed,
            world=self._world,
            global_batch=batch,
            micro_batch=batch // self._world.world_size,
            start=0,
            labels=LabelReader(path=config.data.label_path, names=config.model.id2label or ()),
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


def of_vit(vit: ViTModel) -> Encode:
    """Mean of the patch tokens and, where there is one, the class token, with every patch visible."""

    def encode(pixel_values: Tensor) -> dict[str, Tensor]:
        tokens = vit(pixel_values=pixel_values).last_hidden_state
        cls = {"cls": tokens[:, 0]} if vit.config.use_cls_token else {}
        return {"mean": vit.patch_tokens(tokens).mean(dim=1), **cls}

    return encode


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
    for kind, least in _COLLAPSED.items():
        if scores[kind] < least:
            lines.append(
                f"features have collapsed: {kind} {scores[kind]:.3g}; lower optimizer.lr, lengthen optimizer.warmup, "
                "or look for images that are all alike"
            )
    return lines


def _joined(of_ranks: list[Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features by pooling and labels of all ranks, in the order of the samples' ids."""
    rows = [row for of_rank in of_ranks for row in of_rank if len(row[0])]
    if not rows:
        raise DataError("evaluation: no labelled image could be read; look at evaluation.train and data.label")
    _, first = np.unique(np.concatenate([row[0] for row in rows]), return_index=True)
    labels = np.concatenate([row[1] for row in rows])[first]
    return {name: np.concatenate([row[2][name] for row in rows])[first] for name in rows[0][2]}, labels
