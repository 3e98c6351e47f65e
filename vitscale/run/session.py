"""What the ranks of a run agree on before it trains: process group, index, order, decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vitscale.config.check import has_classes, is_scored_underway
from vitscale.config.load import dump_config
from vitscale.config.schema import RunConfig, Source
from vitscale.config.step import auto_keys, total_steps
from vitscale.data.index import ShardIndex, open_index, require_labels, store_of
from vitscale.data.order import SampleOrder
from vitscale.data.subset import Subset, SubsetOrder
from vitscale.engine.backend import Backend
from vitscale.engine.links import START_BYTES, first_all_reduce
from vitscale.engine.preempt import StopRequest
from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import DataError
from vitscale.evaluation.validation import HeldOut
from vitscale.files.decode import choose_decoder
from vitscale.files.store import absolute
from vitscale.run import preflight
from vitscale.run.auto import settle
from vitscale.run.training_data import named_classes, order_over, sides_of, training_index
from vitscale.run_folder import RunFolder
from vitscale.text import listed, to_stderr, to_stdout
from vitscale.tracking.startup import StartUp
from vitscale.world import World


class Setting(Protocol):
    """What of a start decides from which checkpoints it can go on."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def folder(self) -> RunFolder: ...
    @property
    def index(self) -> ShardIndex: ...
    @property
    def skipped(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Session:
    """One start of a run, its ranks joined and its data found."""

    config: RunConfig  # without auto; with the classes' names, where they lie beside the shards
    world: World
    folder: RunFolder
    backend: Backend
    stop: StopRequest
    index: ShardIndex
    order: SampleOrder
    decoder: str
    held_out: HeldOut | None = None  # what data.validation names, or data.validation_fraction sets apart
    probed: tuple[HeldOut, HeldOut] | None = None  # evaluation.train and test, where they are scored in training
    data_facts: Any = None  # what the job's `look_at_data` found
    adapts: bool = False  # whether weights of another image size or other channels are made to fit
    skipped: tuple[int, ...] = ()  # global batches that rollbacks left out of the order

    @property
    def ranks(self) -> ProcessRanks:
        return self.backend.ranks

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return total_steps(self.config, self.order.batches_per_epoch)

    @property
    def trained(self) -> int:
        """How many samples are trained on: of the index, or of a subset."""
        return self.order.subset.total if isinstance(self.order, SubsetOrder) else self.index.total

    def say(self, line: str) -> None:
        """A line on the terminal, from rank 0."""
        if self.world.is_main:
            to_stdout(line)


# (config with the classes' names, index, what of it is trained on, what is validated on) -> what the job wants to know
# on all ranks
LookAtData = Callable[[RunConfig, ShardIndex, Subset | None, HeldOut | None], Any]


def open_session(
    config: RunConfig,
    world: World,
    folder: RunFolder,
    startup: StartUp,
    stop: StopRequest,
    look_at_data: LookAtData | None = None,
    adapts: bool = False,
) -> Session:
    """Join the ranks, open the index once for all of them, and check that all are of the same run.

    startup: is told what took how long; look_at_data: called on rank 0 before it joins. Raises ConfigError, DataError
    or LaunchError.
    """
    # Rank 0 opens the index before it joins the others, so that a missing shard is an error at once.
    store = store_of(config.data)
    opened = training_index(config, folder, store, world.supervised) if world.is_main else None
    others = look_at_others(config, folder, opened, look_at_data) if opened else None
    startup.done("index")
    backend = Backend(config, world)
    startup.done("joining")
    content = backend.ranks.broadcast(opened.to_bytes() if opened else None)
    index = opened or ShardIndex.from_bytes(content, store)
    decoder = choose_decoder(config.data.decode)
    _require_ready(config, world, backend.ranks, folder, index, decoder)
    if auto_keys(config):
        config = settle(config, world, backend.ranks, backend.device, folder)
        startup.done("choice")
    config = _with_class_names(config, backend.ranks, index)
    others = backend.ranks.gather(others)[0]
    assert others is not None
    sides, facts = others.sides, others.facts
    held_out, train, test = (
        each and HeldOut(ShardIndex.from_bytes(each[0], store), class_names=each[1]) for each in others.indexes
    )
    order = order_over(config, index, sides and sides[0], others.skipped)
    if sides is not None and sides[1].total:
        held_out = HeldOut(index, sides[1])
    probed = None if test is None else (train or HeldOut(index), test)
    startup.done("agreement")
    if world.world_size > 1:
        seconds = first_all_reduce(backend.device)
        startup.note = f"; an all-reduce of {START_BYTES >> 20} MB takes {seconds * 1e3:.0f} ms"
        startup.done("all-reduce")
    return Session(
        config, world, folder, backend, stop, index, order, decoder, held_out, probed, facts, adapts, others.skipped
    )


Packed = tuple[bytes, tuple[str, ...]]  # an index, and the names of the classes beside its shards


@dataclass(frozen=True)
class OtherData:
    """What rank 0 found beside the index."""

    sides: tuple[Subset, Subset] | None  # (training, validation) of the index
    indexes: tuple[Packed | None, ...]  # of data.validation, evaluation.train, evaluation.test
    facts: Any  # the job's
    skipped: tuple[int, ...]  # batches


def look_at_others(
    config: RunConfig, folder: RunFolder, index: ShardIndex, look_at_data: LookAtData | None
) -> OtherData:
    """Rank 0: what a run has beside its index. DataError or ConfigError where it cannot be trained or scored by it."""
    data, label = config.data, config.data.label_extension
    sides = sides_of(config, index)
    evaluation = config.evaluation
    probes = bool(evaluation.test) and is_scored_underway(config)

    def opened(key: str, sources: tuple[Source, ...], needs_labels: bool = True) -> ShardIndex | None:
        if not sources:
            return None
        other = open_index(sources, None, folder.path, label=label, image=data.image, store=index.store, key=key)
        if needs_labels:
            require_labels(other, label)
        return other

    if probes and not evaluation.train:
        require_labels(index, label)
    validation = opened("data.validation", data.validation, config.objective.needs_labels)
    train, test = (
        opened(f"evaluation.{name}", sources) if probes else None
        for name, sources in (("train", evaluation.train), ("test", evaluation.test))
    )
    own = index.class_names
    named = named_classes(config, own)
    if validation is not None:
        tell_shared("data.validation", validation, "data.train", index)
        if has_classes(config):
            names = named.model.id2label or own
            require_same_classes("data.validation", validation.class_names, "training", names)
    if test is not None:
        require_held_out(test, train or index)
    indexes = tuple(None if each is None else packed(each) for each in (validation, train, test))
    held_out = None if validation is None else HeldOut(validation)
    if sides is not None and sides[1].total:
        held_out = HeldOut(index, sides[1])
    facts = None if look_at_data is None else look_at_data(named, index, sides and sides[0], held_out)
    return OtherData(sides, indexes, facts, folder.skipped_batches())


def packed(index: ShardIndex) -> Packed:
    """What the other ranks are told of an index."""
    return index.to_bytes(), tuple(index.class_names or ())


def require_held_out(test: ShardIndex, fitted: ShardIndex) -> None:
    """That evaluation.test has the classes of evaluation.train; said where it has its shards too."""
    tell_shared("evaluation.test", test, "evaluation.train", fitted)
    require_same_classes(
        "evaluation.test",
        test.class_names,
        "evaluation.train",
        fitted.class_names,
    )


def require_same_classes(key: str, names: Sequence[str] | None, other: str, expected: Sequence[str] | None) -> None:
    """DataError where both sides name their classes, and not alike: a label's number would mean two things."""
    if names and expected and tuple(names) != tuple(expected):
        raise DataError(
            f"{key}: classes.json beside its shards says {listed(names)}, that of {other} {listed(expected)}: a label "
            "would mean another class; pack both at once (vitscale pack --held-out), or with --classes classes.json"
        )


def tell_shared(key: str, held_out: ShardIndex, other: str, fitted: ShardIndex) -> None:
    """Say on stderr where a held-out shard is one of those that are trained on."""
    shared = {absolute(path) for path in held_out.paths} & {absolute(path) for path in fitted.paths}
    if shared:
        to_stderr(f"{key}: {listed(sorted(shared), 3)}: in {other} too, so images are scored that were trained on")


def config_digest(config: RunConfig) -> str:
    """16 hex digits: a hash of the resolved config."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]


def _with_class_names(config: RunConfig, ranks: ProcessRanks, index: ShardIndex) -> RunConfig:
    """The config, and in it the names of classes that have none, where they lie beside the shards; rank 0 looks."""
    model = config.model
    if not has_classes(config) or not config.objective.needs_labels or model.id2label is not None:
        return config
    names = ranks.gather(index.class_names if ranks.rank == 0 else None)[0]
    if names and len(names) != model.num_labels and ranks.rank == 0:
        to_stderr(
            f"warning: model.num_labels={model.num_labels}, and classes.json beside the shards names {len(names)} "
            f"classes ({listed(names, 5)})"
        )
    return named_classes(config, names)


def _require_ready(
    config: RunConfig, world: World, ranks: ProcessRanks, folder: RunFolder, index: ShardIndex, decoder: str
) -> None:
    """All ranks must have the same folder, config, data and code, or they would train different runs, and each must be
    able to read and write. A collective."""
    common = {
        "run folder": f"held by {folder.owner()}",
        "config": config_digest(config),
        "index": index.digest,
        "decoder": decoder,
    }
    own = preflight.problems(config, world, folder.checkpoints, index)
    preflight.require_ready(ranks, preflight.RankReport(common | preflight.versions(), own))
