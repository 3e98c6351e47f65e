"""Held-out images scored by the model in training: each image once, on all ranks together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscale.augment.feed import DeviceFeed, FedBatch
from vitscale.augment.pipeline import Augment
from vitscale.config.check import problem_type
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig
from vitscale.data.crop import evaluation_crop
from vitscale.data.index import ShardIndex
from vitscale.data.labels import LabelReader
from vitscale.data.loader import Loader
from vitscale.data.order import SampleOrder, SequentialOrder
from vitscale.data.subset import Subset, SubsetOrder, chosen_by_hash
from vitscale.engine.whole import Evaluable
from vitscale.errors import DataError
from vitscale.world import World

CHUNK = 64  # images of a forward whose loss is not split by image


@dataclass(frozen=True)
class HeldOut:
    """The images to score on: those of an index, or some of them."""

    index: ShardIndex
    subset: Subset | None = None
    class_names: tuple[str, ...] = ()  # beside the shards, where their labels are names

    @property
    def total(self) -> int:
        return self.index.total if self.subset is None else self.subset.total

    def at_most(self, images: int, label: str) -> HeldOut:
        """About so many of them, the same ones every time; all where there are no more. DataError for none."""
        if self.total <= images:
            return self
        chosen = chosen_by_hash(self.index, label, images / self.total, self.subset)
        if not chosen.total:
            raise DataError(
                f"evaluation.images={images}: a hash chooses none of {self.total} images, about so many on average; "
                "raise it"
            )
        return replace(self, subset=chosen)

    def order(self, batch: int) -> SampleOrder:
        """Each once, in the index's order."""
        if self.subset is None:
            return SequentialOrder(self.index.samples, batch)
        return SubsetOrder(SequentialOrder(self.subset.counts, batch), self.subset)


@dataclass(frozen=True)
class Outcome:
    """What one validation gave; details on rank 0 alone."""

    scores: dict[str, float]  # "validation/top1" and so on
    details: dict[str, Any]  # the table of classes and the confusion matrix, where there are classes


class Validation:
    """Scores labels, or the loss of hidden patches, on all ranks at once, whatever wraps the model; what follows in
    training is the same bits."""

    def __init__(self, config: RunConfig, world: World, held_out: HeldOut, name: str = "validation") -> None:
        """name: what the scores begin with."""
        self._name = name
        self._config, self._world, self._held_out = config, world, held_out
        self._is_supervised = problem_type(config) is not None and config.objective.name == "classification"
        share = -(-held_out.total // world.world_size)
        self._micro = min(config.evaluation.batch, share if self._is_supervised else min(CHUNK, held_out.total))

    def run(self, engine: Evaluable) -> Outcome:
        """Score the weights, and beside their moving average, if there is one, the weights themselves as
        "validation/raw_...". A collective. DataError where no image can be read."""
        if not self._is_supervised:
            return Outcome(self._loss_of_hidden_patches(engine), {})
        scores, details = self._scores(engine, average=True)
        named = {f"{self._name}/{name}": value for name, value in scores.items()}
        if engine.ema is not None:
            raw, _ = self._scores(engine, average=False)
            named |= {f"{self._name}/raw_{name}": value for name, value in raw.items() if name not in ("images", "bad")}
        return Outcome(named, details)

    def _loss_of_hidden_patches(self, engine: Evaluable) -> dict[str, float]:
        """The objective's own loss, its masks hashed from the samples' keys, so the same every time.

        In chunks of CHUNK images, as many on any number of ranks; what is left after the last whole one is not scored.
        """

        def measure(output: Any, batch: FedBatch) -> dict[str, Tensor]:
            whole = float((batch.repeats == 0).all())
            return {"loss": whole * output.loss.detach(), "chunks": torch.tensor(whole)}

        batch = self._micro * self._world.world_size
        with self._loader() as loader, DeviceFeed(loader, self._augment(engine), engine.device) as feed:
            sums = engine.evaluate(feed, self._held_out.order(batch).batches_per_epoch, measure)
        images = sums["chunks"] * self._micro
        return {f"{self._name}/loss": sums["loss"] / sums["chunks"], f"{self._name}/images": images}

    def _scores(self, engine: Evaluable, average: bool) -> tuple[dict[str, float], dict[str, Any]]:
        own: list[tuple[np.ndarray, np.ndarray]] = []  # logits and labels of this rank's images
        bad = 0

        def keep(output: Any, batch: FedBatch) -> dict[str, Tensor]:
            nonlocal bad
            first = self._world.rank * self._micro
            chosen = batch.repeats == 0  # not what fills up the last batch
            replaced = np.array([each.slot - first for each in batch.replaced], dtype=np.int64)
            bad += int(chosen[replaced].sum())
            chosen[replaced] = False  # another image stands there, which is counted in its own place
            own.append((output.logits.float().cpu().numpy()[chosen], batch.inputs["labels"].cpu().numpy()[chosen]))
            return {"images": torch.tensor(float(chosen.sum()))}

        with self._loader() as loader, DeviceFeed(loader, self._augment(engine), engine.device) as feed:
            order = self._held_out.order(self._micro * self._world.world_size)
            engine.evaluate(feed, order.batches_per_epoch, keep, average)
        logits, labels = (np.concatenate(arrays) for arrays in zip(*own, strict=True))
        gathered = engine.ranks.collect((logits, labels, bad))
        scores, details = self._summed_up(gathered) if engine.ranks.rank == 0 else ({}, {})
        scores = engine.ranks.gather(scores)[0]
        if not scores["images"]:
            raise DataError(
                f"data.validation: of {self._held_out.total} images none could be read; look at data.label and "
                "data.decode"
            )
        return scores, details

    def _summed_up(self, gathered: list[Any]) -> tuple[dict[str, float], dict[str, Any]]:
        logits, labels = (np.concatenate([of_rank[part] for of_rank in gathered]) for part in (0, 1))
        bad = sum(of_rank[2] for of_rank in gathered)
        kind, counts = problem_type(self._config), {"images": float(len(labels)), "bad": float(bad)}
        assert kind is not None, "config/check.py refuses a validation without labels"
        if not len(labels):
            return counts, {}
        names = self._config.model.id2label or tuple(map(str, range(logits.shape[1])))
        # Not at the top: sklearn is a second of every start, and only what validates by labels needs it.
        from vitscale.evaluation.metrics import by_class, by_label, scores_of

        tables = {"single_label_classification": by_class, "multi_label_classification": by_label}
        details = tables[kind](logits, labels, list(names)) if kind in tables else {}
        return scores_of(kind, logits, labels) | counts, details

    def _loader(self) -> Loader:
        config, size = self._config, pair(self._config.model.image_size)
        batch = self._micro * self._world.world_size
        return Loader(
            index=self._held_out.index,
            order=self._held_out.order(batch),
            crop=evaluation_crop(config.evaluation.crop_fraction, size),
            data=config.data,
            num_channels=config.model.num_channels,
            seed=config.run.seed,
            world=self._world,
            global_batch=batch,
            micro_batch=self._micro,
            start=0,
            labels=LabelReader.of(config),
            image_size=size,
        )

    def _augment(self, engine: Evaluable) -> Augment:
        config = self._config
        size, channels = pair(config.model.image_size), config.model.num_channels
        labels = config.objective.needs_labels
        return Augment(config.augment, size, channels, str(engine.device), train=False, labels=labels)
