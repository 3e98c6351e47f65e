"""`vitscale finetune`: a pretrained encoder trained on labels, by the same loop as pretraining."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vitscale.config.check import check_config, has_classes, problem_type
from vitscale.config.load import Flat
from vitscale.config.schema import Model, RunConfig, Source
from vitscale.data.index import ShardIndex
from vitscale.data.labels import LabelCounts, LabelReader, count_labels
from vitscale.data.patterns import expand
from vitscale.data.subset import Subset
from vitscale.engine.engine import Engine
from vitscale.errors import CheckpointError, ConfigError, DataError
from vitscale.evaluation.validation import HeldOut
from vitscale.files.classes import class_names
from vitscale.files.model_folder import CONFIG, PROCESSOR, read_json
from vitscale.files.retry import PATIENCE_S
from vitscale.files.sources import locate
from vitscale.files.store import is_remote
from vitscale.files.stores import Stores
from vitscale.interop.config_files import config_as, read_config
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.loading import config_of, keys_for_files, open_by_tensors
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.freezing import depth, freeze
from vitscale.models.losses import supervised_loss
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.prepare.image_folder import PACKED, classes_of, is_image_folder, pack_folder, packed_sources
from vitscale.run.job import Job
from vitscale.run.pretrain import run_locked
from vitscale.run.session import Session
from vitscale.text import listed, to_stderr
from vitscale.world import World

# What fine-tuning decides itself, whatever the encoder was trained with.
_OWN = {"num_labels", "id2label", "problem_type", "drop_path_rate", "pooling", "fc_norm", "encoder_stride",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_output_size", "pooler_act"}  # fmt: skip


def finetune(config: RunConfig, world: World) -> int:
    """Train, or resume where this run stopped; the exit code (DONE or STOPPED).

    Raises VitscaleError where the user can mend the cause.
    """
    job = Finetune(config, world)
    check_config(job.config, world)
    return run_locked(job)


def complete(written: Flat) -> Flat:
    """Keys that stand below what a config says: the encoder's, from model.init_from; the classes, from the data."""
    keys: Flat = {"objective.name": "classification"}
    source = written.get("model.init_from")
    if source is not None:
        keys |= _of_checkpoint(str(source), written)
    if not written.keys() & {"model.num_labels", "model.id2label"} and written.get("data.train"):
        keys |= _of_labels(written)
    return keys


def _of_labels(written: Flat) -> Flat:
    """How many labels there are, where the config does not say."""
    kind = written.get("model.problem_type")
    if kind == "regression":
        return {"model.num_labels": 1}
    names = _classes(written)
    if names is None:
        _require_there(written["data.train"])
        raise ConfigError(
            "model.num_labels: is not written, and no classes.json beside data.train names the classes (vitscale pack "
            "writes it): set model.num_labels, or model.id2label=[NAME, NAME, ...]"
        )
    if len(names) == 1:
        raise ConfigError(
            f"data.train: {names[0]} is its only class, and a classifier needs two; for numbers as labels set "
            "model.problem_type=regression"
        )
    return {"model.id2label": tuple(names), "model.num_labels": len(names)}


def _require_there(sources: tuple[Source, ...]) -> None:
    """DataError for a name that stands for nothing, and for a folder that tells no classes."""
    for pattern in (source.pattern for source in sources):
        if is_image_folder(pattern):
            raise DataError(
                f"data.train={pattern}: is a folder without shards (*.tar) and without folders of images, whose names "
                "would be the classes: put the images into one folder a class"
            )
        if not is_remote(pattern) and not Path(pattern).expanduser().exists() and not re.search(r"[*?\[{]", pattern):
            raise DataError(f"data.train={pattern}: there is no such file or folder; check the path")


def _of_checkpoint(source: str, written: Flat) -> Flat:
    """The sizes of its encoder and what its pixels were normalized by."""
    own = {name.removeprefix("model."): value for name, value in written.items() if name.startswith("model.")}
    opened = open_by_tensors(source, keys_for_files(None, own), own.get("init_take"))
    if opened is not None:
        config, processor = opened.model.config, processor_keys(opened.processor)
    else:
        folder = locate(source)
        config = config_as(ViTConfig, read_config(folder / CONFIG))
        if (folder / PROCESSOR).is_file():
            processor = processor_keys(ViTImageProcessor.from_pretrained(folder))
        else:  # as transformers' Trainer leaves it
            processor = {"augment.mean": (0.5,), "augment.std": (0.5,)}
            to_stderr(f"model.init_from={source}: has no {PROCESSOR}: images are normalized by 0.5 and 0.5")
    return _encoder_keys(config) | {name: value for name, value in processor.items() if name.startswith("augment.")}


def sizes_of_encoder(written: Flat) -> Flat:
    """Of what `complete` adds, that which decides what a run needs: no data are opened, and no weights but those of a
    model.init_from that says its sizes by them alone."""
    own = {name.removeprefix("model."): value for name, value in written.items() if name.startswith("model.")}
    config = config_of(str(written["model.init_from"]), own, own.get("init_take"))
    return _encoder_keys(config_as(ViTConfig, config))


def _encoder_keys(config: ViTConfig) -> Flat:
    keys = {name: value for name, value in model_keys_of(config).items() if name.removeprefix("model.") not in _OWN}
    if config.position_embeddings != "none":  # a fixed table is trained on from here, as by the MAE code
        keys["model.position_embeddings"] = "learned"
    return keys


def model_keys_of(config: ViTConfig) -> Flat:
    """A model's sizes and classes as keys of a run's config."""
    shared = {item.name for item in fields(Model)} & {item.name for item in fields(ViTConfig)}
    keys = {f"model.{name}": getattr(config, name) for name in shared - {"id2label"}}
    if config.id2label is not None and config.has_class_names:
        keys["model.id2label"] = tuple(config.id2label[number] for number in sorted(config.id2label))
    return keys


def processor_keys(processor: ViTImageProcessor) -> Flat:
    """How a model's images are prepared, as keys of a run's config."""
    keys: Flat = {}
    for name in ("mean", "std"):
        value = getattr(processor, f"image_{name}")
        keys[f"augment.{name}"] = value if isinstance(value, tuple) else (value,)
    edge = (processor.size or {}).get("shortest_edge")
    crops = processor.do_center_crop and edge
    keys["evaluation.crop_fraction"] = min(1.0, processor.crop_size["height"] / edge) if crops else 1.0
    return keys


def _classes(written: Flat) -> list[str] | None:
    sources = written["data.train"]
    folders = classes_of(sources)
    if folders is not None:
        return folders
    if any(is_image_folder(source.pattern) for source in sources):
        return None
    store = Stores(
        written.get("data.cache"), written.get("data.cache_bytes"), written.get("data.patience_s", PATIENCE_S)
    )
    return class_names(expand(sources, store, "data.train"), store, one_meaning=True)


class Finetune(Job):
    """A Job that starts from an encoder, and whose labels are looked at before the first step."""

    adapts = True

    def __init__(self, config: RunConfig, world: World) -> None:
        super().__init__(config, world)
        if config.objective.name != "classification":
            raise ConfigError(
                f"objective.name={config.objective.name}: vitscale finetune trains on labels; leave it out "
                "(model.problem_type says of what kind they are), or use vitscale pretrain"
            )
        data, path = config.data, self.folder.path
        self._classes = classes_of(data.train)  # the validation's labels are numbered as the training's
        self._folders = {PACKED: data.train, f"{PACKED}-validation": data.validation}
        packed = {name: packed_sources(sources, path / name) for name, sources in self._folders.items()}
        train, validation = packed.values()
        self.config = replace(config, data=replace(data, train=train, validation=validation))

    def prepare(self) -> None:
        """Rank 0, before the others are joined: pack folders of images."""
        for name, sources in self._folders.items():
            pack_folder(sources, self.folder.path / name, self.config.model.id2label or self._classes)

    def look_at_data(
        self, config: RunConfig, index: ShardIndex, training: Subset | None, held_out: HeldOut | None
    ) -> Any:
        """Rank 0: DataError where the labels are not such as can be learned. How many images each class has, if all
        were counted."""
        reader, extension = LabelReader.of(config), config.data.label_extension
        counts = count_labels(index, extension, reader, training)
        _require_names(config, index)
        _require_labels(config, counts)
        if held_out is not None:
            scored = count_labels(held_out.index, extension, reader, held_out.subset)
            require_readable(config, scored, "of what is validated on, ")
        return [] if counts.too_long else sorted(counts.classes.items())

    def build(self, session: Session, drawn: bool) -> ViTPreTrainedModel:
        model = super().build(session, drawn)
        assert isinstance(model, ViTForImageClassification)
        classification = session.config.objective.classification
        if drawn and classification.head_std is not None:  # where the checkpoint has a head, that comes later
            with torch.no_grad():
                model.get_parameter("classifier.weight").mul_(classification.head_std / model.config.initializer_range)
        weights = classification.class_weights
        if weights == "balanced":
            weights = balanced_weights(dict(session.data_facts), session.config.model.num_labels)
        assert not isinstance(weights, str)
        model.loss_function = supervised_loss(model.config, classification.loss, weights)
        freeze(model, session.config.train.freeze)
        return model

    def engine(self, session: Session, model: ViTPreTrainedModel) -> Engine:
        decay = session.config.optimizer.layer_decay
        scales = layer_scales(model, decay) if decay < 1 else None
        tokens = {name for name, _ in model.named_parameters() if _is_token(name)}  # timm's and MAE's fine-tuning
        return session.backend.wrap(model, session.config, scales, tokens)


def balanced_weights(counts: Mapping[int, int], num_labels: int) -> tuple[float, ...]:
    """1 / frequency by class, with a mean over the images of 1; 0 for a class without one."""
    if not counts:
        raise DataError(
            "objective.classification.class_weights=balanced: the labels are too long to be counted; "
            "write the weights as a list"
        )
    total, classes = sum(counts.values()), len(counts)
    return tuple(total / (classes * counts[each]) if counts.get(each) else 0.0 for each in range(num_labels))


def layer_scales(model: ViTPreTrainedModel, decay: float) -> dict[str, float]:
    """Factors of the learning rate: 1 for the head and the last norm, `decay` for the last block, and so on down to the
    embeddings (MAE's util/lr_decay.py, after BEiT)."""
    layers = model.config.num_hidden_layers
    return {name: decay ** (layers + 1 - depth(name, layers)) for name, _ in model.named_parameters()}


def _is_token(name: str) -> bool:
    return name.rpartition(".")[2] in ("cls_token", "register_tokens", "mask_token", "position_embeddings")


def _require_names(config: RunConfig, index: ShardIndex) -> None:
    """The classes of config, data and checkpoint must be the same, or numbers would stand for others."""
    names, model = index.class_names if problem_type(config) != "regression" else None, config.model
    if names is not None and model.id2label is not None and tuple(names) != model.id2label:
        raise DataError(
            f"model.id2label is {listed(model.id2label)}, and classes.json beside the shards says {listed(names)}: the "
            "labels' numbers would stand for other classes; leave model.id2label out"
        )
    if names is not None and len(names) != model.num_labels:
        raise DataError(
            f"model.num_labels={model.num_labels}: classes.json beside the shards names {len(names)} classes "
            f"({listed(names)}); leave model.num_labels out, or take classes.json away"
        )
    if not model.init_from or Path(model.init_from).is_file() or model.id2label is None:
        return
    path = locate(model.init_from) / CONFIG
    content = read_json(path)
    if "model_type" not in content:  # timm's, as a file of weights
        return
    before = read_config(path, content)
    classifies = any("ForImageClassification" in str(name) for name in content.get("architectures") or ())
    if classifies and before.has_class_names and before.num_labels == model.num_labels:
        own = tuple((before.id2label or {}).values())
        if own != model.id2label:
            raise CheckpointError(
                f"model.init_from={model.init_from}: its classes are {listed(own)}, those of the data "
                f"{listed(model.id2label)}: its classifier is of others; start from its encoder alone: "
                f"ViTModel.from_pretrained({model.init_from!r}).save_pretrained(FOLDER)"
            )


def _require_labels(config: RunConfig, counts: LabelCounts) -> None:
    data = config.data
    require_readable(config, counts)
    classes = {label for label in counts.classes if label >= 0}
    if has_classes(config) and len(classes) == 1 and not counts.too_long:
        raise DataError(
            f"data.label={data.label}: every image has the label {classes.pop()}; a classifier needs two classes"
        )


def require_readable(config: RunConfig, counts: LabelCounts, which: str = "") -> None:
    """DataError for more bad labels than data.max_bad_fraction lets pass, and for labels that count from 1, of which
    few are out of range where there are many classes."""
    data, seen = config.data, counts.good + counts.bad
    is_shifted = counts.count_from_one(config.model.num_labels) and not counts.too_long
    if is_shifted or counts.bad > max(3, data.max_bad_fraction * seen):
        raise DataError(
            f"data.label={data.label}: {which}{counts.bad} of {seen} labels are not what {problem_type(config)} needs "
            f"({counts.first_bad}); {_way_out(config.model, counts)}"
        )


def _way_out(model: Model, counts: LabelCounts) -> str:
    last, found = model.num_labels, counts.strangers
    if counts.count_from_one(last):
        return f"none is 0 and {found[last]} are {last}: they count from 1 to {last}: write them from 0 to {last - 1}"
    words = sorted(counts.words)
    if model.id2label is None and sum(found[word] for word in words) > counts.good:
        names = ", ".join(words[:3] + ["..."] * (len(words) > 3))
        return f"give their names: model.id2label=[{names}] or a classes.json beside the shards"
    return "mend them, or set data.label, model.num_labels, model.id2label or model.problem_type"
