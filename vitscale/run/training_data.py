"""What a run trains on, from its config: its index, their order, and the loader of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitscale.config.check import has_classes
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig
from vitscale.data.crop import training_crop
from vitscale.data.derived_order import SkippingOrder
from vitscale.data.handover import taken_over
from vitscale.data.index import ShardIndex, open_index, require_images, require_labels, unused_cache
from vitscale.data.labels import LabelReader
from vitscale.data.loader import Loader
from vitscale.data.mixture import training_order
from vitscale.data.order import SampleOrder
from vitscale.data.parallel import report
from vitscale.data.subset import Subset, SubsetOrder, split
from vitscale.errors import ConfigError
from vitscale.files.stores import Stores
from vitscale.run_folder import RunFolder
from vitscale.world import World


def training_index(config: RunConfig, folder: RunFolder, store: Stores, supervised: bool = False) -> ShardIndex:
    """The index of data.train; supervised: as the launcher has left it, if it has. DataError where the objective needs
    labels, and there are none."""
    data = config.data
    if not data.train:
        raise ConfigError("data.train is empty: give the shards, say data.train='/data/train-{000000..000099}.tar'")
    index = taken_over(data, folder.path, store) if supervised else None
    index = index or open_index(
        data.train, data.index, folder.path, label=data.label_extension, image=data.image, store=store
    )
    if line := unused_cache(data, index.paths):
        report(line)
    require_images(index, data.label_extension)
    if config.objective.needs_labels:
        require_labels(index, data.label_extension)
    return index


def sides_of(config: RunConfig, index: ShardIndex) -> tuple[Subset, Subset] | None:
    """(training, validation) of the index; None where all of it is trained on. Reads the tables of all shards."""
    data = config.data
    return split(index, data, config.run.seed) if data.validation_fraction or data.fraction < 1 else None


def order_over(
    config: RunConfig, index: ShardIndex, training: Subset | None, skipped: tuple[int, ...] = ()
) -> SampleOrder:
    """The order of what is trained on (None: all of the index), without the batches of these numbers."""
    order: SampleOrder = training_order(config, index.samples if training is None else training.counts, index.sources)
    if skipped:
        order = SkippingOrder(order, skipped)
    return order if training is None else SubsetOrder(order, training)


def named_classes(config: RunConfig, names: Sequence[str] | None) -> RunConfig:
    """The config, with these names of its classes where they belong to it and it has none."""
    model = config.model
    if names is None or model.id2label is not None or len(names) != model.num_labels or not has_classes(config):
        return config
    return replace(config, model=replace(model, id2label=tuple(names)))


def training_loader(config: RunConfig, index: ShardIndex, order: SampleOrder, world: World, samples: int) -> Loader:
    """This rank's training batches after so many global samples."""
    size = pair(config.model.image_size)
    return Loader(
        index=index,
        order=order,
        crop=training_crop(config.augment, size),
        data=config.data,
        num_channels=config.model.num_channels,
        seed=config.run.seed,
        world=world,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        start=samples,
        labels=LabelReader.of(config),
        image_size=size,
    )
