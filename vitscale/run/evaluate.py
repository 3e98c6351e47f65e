"""`vitscale evaluate RUN|MODEL`: frozen features, and a classifier's or decoder's own scores, on held-out images.

The code that scores a run while it trains, on all images instead of some, on all ranks.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscale import __version__
from vitscale.config.check import problem_type
from vitscale.config.load import config_of, dump_config, load_config
from vitscale.config.schema import RunConfig, Source
from vitscale.data.index import ShardIndex, open_index, require_labels, store_of
from vitscale.data.subset import Subset, split
from vitscale.engine.ranks import ProcessRanks, joined
from vitscale.engine.whole import WholeModel
from vitscale.errors import CheckpointError, ConfigError, DataError
from vitscale.evaluation.features import Encode, FeatureTable, pixels
from vitscale.evaluation.figures import draw_curves
from vitscale.evaluation.probing import Probing, encoder_of
from vitscale.evaluation.validation import HeldOut, Validation
from vitscale.files.atomic import write_atomically
from vitscale.files.stores import Stores
from vitscale.interop.loading import open_model, start_from
from vitscale.interop.pretrained import load_model
from vitscale.models.auto import OBJECTIVES, initialize, new_model
from vitscale.models.vit import ViTModel, ViTPreTrainedModel
from vitscale.prepare.image_folder import PACKED, classes_of, pack_folder, packed_sources
from vitscale.run.finetune import model_keys_of, processor_keys
from vitscale.run.report import report
from vitscale.run.session import Packed, packed, require_held_out
from vitscale.run_folder import DONE, RunFolder
from vitscale.text import aligned, listed, to_stderr
from vitscale.tracking.jsonl import JsonlFile
from vitscale.tracking.outbox import Outbox
from vitscale.world import World

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Subject:
    """What is scored, and what it is compared with."""

    config: RunConfig  # evaluation and data say what on
    models: dict[str, ViTPreTrainedModel]  # "trained" first, then "untrained" and, where there is one, "start"


def evaluate(
    source: str, world: World, overrides: Sequence[str] = (), out: Path | None = None, take: str | None = None
) -> RunFolder:
    """Score a run's or any model's features on evaluation.test, or by cross-validation on evaluation.train alone.

    `source`: a run's folder, or what `open_model` takes; `overrides`: of the run's config, for keys of data and
    evaluation; `out`: where evaluation.jsonl, summary.json and figures/ go, for a run its own folder if None;
    `take`: which of a file's sets of weights. The scores are in summary.json of the folder that is returned. Raises
    VitscaleError where the user can mend the cause.
    """
    folder = RunFolder(Path(source).expanduser())
    is_run = folder.config.exists()
    if out is not None and out.resolve() == folder.path.resolve():
        out = None
    if out is not None and (RunFolder(out).metrics.exists() or RunFolder(out).checkpoints.exists()):
        raise ConfigError(f"--out {out}: is the folder of another run; name one for the scores alone")
    if is_run and take is not None:
        raise ConfigError(f"--take {take}: is for a file of weights, and {source} is a run's folder; leave it out")
    if not is_run and out is None:
        raise ConfigError(f"{source}: is no run folder (no config.yaml in it); for a model's scores add --out FOLDER")
    results = RunFolder(out) if out else folder
    try:
        results.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {results.path}: cannot be made: {error.strerror}; name a folder of yours") from None
    subject = _of_run(folder, overrides) if is_run else _of_model(source, overrides, take)
    config = subject.config
    if is_run and world.is_main:
        draw_curves(JsonlFile(folder.metrics).rows(), results.figures / "loss.png", _title(config))
    opened = _open(subject, results) if world.is_main else None
    with joined(world, config.parallel.timeout_s) as ranks:
        train, test = _held_out(opened, ranks, store_of(config.data))
        scored = test or train
        assert scored is not None, "_open refuses neither"
        device = torch.device(world.device, world.local_rank) if world.device == "cuda" else torch.device("cpu")
        probing = Probing(config, world, train, test, results.path)
        title = f"{_title(config)}, {'held-out' if test else 'training'} images"
        probing.draw(WholeModel(subject.models["trained"], ranks, device), results.figures, title)
        if not _is_labelled(config):
            raise ConfigError(
                f"evaluation.test is empty: figures are in {results.figures}, but features are scored on held-out "
                "labelled shards, as `vitscale pack --held-out` makes them: add evaluation.test='FOLDER/test/*.tar'"
            )
        scores, summary = _score(subject, probing, ranks, device, world)
        if world.is_main:
            _write(results, summary | {"source": str(source), "scores": scores})
            if out is not None:
                _name(results, config, source, scored.index.digest)
            report(results)
        ranks.barrier()
    return results


def saved_scores(folder: RunFolder) -> dict[str, Any]:
    """What an earlier evaluation left in summary.json."""
    summary = _summary(folder)
    if not summary and not folder.config.exists():
        raise CheckpointError(f"{folder.path}: is no run's folder, nor one of scores; check the name")
    if "evaluation" not in summary:
        raise CheckpointError(f"{folder.summary}: holds no scores yet; `vitscale evaluate {folder.path}` makes them")
    return summary["evaluation"]


def as_table(evaluation: Mapping[str, Any]) -> str:
    """The scores for the terminal, in percent with one standard error or, of folds and draws, one deviation."""
    scores: Scores = evaluation["scores"]
    kinds = {"linear_probe": "linear probe", "knn": "kNN", "linear_probe_folds": "cross-validated"}
    kinds |= {name: f"{name.removeprefix('few_shot_')} a class" for row in scores.values() for name in row
              if name.startswith("few_shot_") and not name.endswith("_sd")}  # fmt: skip
    kinds = {name: title for name, title in kinds.items() if any(name in row for row in scores.values())}
    lines = [("features", *kinds.values())] if scores else []
    for name, row in scores.items():
        errors = {kind: row.get(f"{kind}_se", row.get(f"{kind}_sd", 0.0)) for kind in kinds}
        lines.append((name, *(f"{100 * row[kind]:.1f} +- {100 * errors[kind]:.1f} %" for kind in kinds)))
    own = [f"{name} {value:.4g}" for name, value in evaluation.get("test_scores", {}).items()]
    table = [aligned(lines, right=range(1, len(kinds) + 1))] if lines else []
    return "\n".join([*table, *([f"its own: {', '.join(own)}"] if own else [])])


def _of_run(folder: RunFolder, overrides: Sequence[str]) -> Subject:
    if not (folder.model / "config.json").exists():
        raise CheckpointError(
            f"{folder.path}: has no model/ yet; let the run end, or make it from the newest checkpoint with "
            f"`vitscale export {folder.path}`"
        )
    config = load_config(folder.config, overrides)
    if config.objective.needs_labels and not config.evaluation.test:
        config = replace(config, evaluation=replace(config.evaluation, test=config.data.validation))
    models = {"trained": load_model(folder.model), "untrained": new_model(config, config.run.seed)}
    if config.model.init_from:
        try:
            start = new_model(config, config.run.seed)
            start_from(start, config.model.init_from, adapt=True, take=config.model.init_take)
            models["start"] = start
        except (CheckpointError, ConfigError) as error:
            to_stderr(f"what the run started from is not scored: {error}")
    return Subject(config, models)


def _of_model(source: str, overrides: Sequence[str], take: str | None) -> Subject:
    opened = open_model(source, take=take)
    for note in opened.notes:
        to_stderr(f"{source}: {note}")
    model = opened.model
    keys = model_keys_of(model.config) | processor_keys(opened.processor) | {"run.name": Path(source).name}
    keys["tracking.mlflow"] = any(override.startswith("tracking.") for override in overrides)
    objective = next((name for name, each in OBJECTIVES.items() if each is type(model)), None)
    config = config_of(keys | ({"objective.name": objective} if objective else {}), overrides)
    with torch.device("meta"):
        untrained = type(model)(model.config)
    initialize(untrained, config.run.seed)
    return Subject(config, {"trained": model, "untrained": untrained})


Side = tuple[Packed, Subset | None]  # shards, and which of their samples; None: all


def _open(subject: Subject, results: RunFolder) -> dict[str, Side | None]:
    """The images of both sides, as rank 0 finds them; folders of images are packed in the results' folder."""
    config, data = subject.config, subject.config.data
    evaluation, label, store = config.evaluation, data.label_extension, store_of(data)
    trained = evaluation.train or data.train
    if not trained and not (evaluation.test and config.objective.needs_labels):
        raise ConfigError("evaluation.train is empty: name labelled shards, say evaluation.train='FOLDER/train/*.tar'")

    def opened(sources: tuple[Source, ...], indexed: str | None, name: str) -> ShardIndex | None:
        if not sources:
            return None
        out = results.path / f"{PACKED}-{name}"
        pack_folder(sources, out, config.model.id2label or classes_of(trained))
        shards = packed_sources(sources, out)
        key = "data.train" if sources is data.train else f"evaluation.{name}"
        index = open_index(shards, indexed, results.path, label=label, image=data.image, store=store, key=key)
        if _is_labelled(config):
            require_labels(index, label)
        return index

    fitted = opened(trained, None if evaluation.train else data.index, "train")
    test = opened(evaluation.test, None, "test")
    if fitted is not None and test is not None:
        require_held_out(test, fitted)
    sides: dict[str, tuple[ShardIndex | None, Subset | None]] = {"train": (fitted, None), "test": (test, None)}
    if fitted is not None and _splits(config):
        training, validation = split(fitted, data, config.run.seed)
        sides = {"train": (fitted, training), "test": (fitted, validation)}
    return {name: None if index is None else (packed(index), subset) for name, (index, subset) in sides.items()}


def _held_out(opened: Any, ranks: ProcessRanks, store: Stores) -> tuple[HeldOut | None, HeldOut | None]:
    def of(side: Side | None) -> HeldOut | None:
        if side is None:
            return None
        (content, class_names), subset = side
        return HeldOut(ShardIndex.from_bytes(content, store), subset, class_names)

    found = ranks.gather(opened)[0]
    return of(found["train"]), of(found["test"])


def _splits(config: RunConfig) -> bool:
    """Whether what is scored on is what the run set apart of its training images."""
    named = config.evaluation.test or config.evaluation.train
    return not named and config.objective.needs_labels and config.data.validation_fraction > 0


def _score(
    subject: Subject, probing: Probing, ranks: ProcessRanks, device: torch.device, world: World
) -> tuple[Scores, dict[str, Any]]:
    """One pass over the images for all encoders, then the scores of each."""
    config, models = subject.config, nn.ModuleDict(subject.models)
    scores: Scores = {}
    summary: dict[str, Any] = {}
    if probing.train is not None and not _takes_vectors(config):
        whole = WholeModel(models, ranks, device)
        train, test = probing.tables(whole, _all_encoders)
        summary = _counts(config, probing, {"train": train, "test": test}, ranks)
        for name in (*subject.models, "pixels"):
            poolings = [pooling for pooling in train.poolings if pooling.startswith(f"{name}/")]
            scores[name] = probing.scores_of(whole, train, test, poolings, config.evaluation.shots)
    if probing.test is not None and _own_scores_fit(subject, probing.test):
        own = Validation(config, world, probing.test, name="test")
        outcome = own.run(WholeModel(subject.models["trained"], ranks, device))
        summary |= {"test_scores": outcome.scores, **outcome.details}
        bad = outcome.scores.get("test/bad", 0.0)
        if bad > max(3, config.data.max_bad_fraction * probing.test.total) and ranks.rank == 0:
            to_stderr(
                f"warning: {bad:.0f} of {probing.test.total} test images are not scored: their labels "
                "are none of the classes, or they cannot be read; look at data.label, and at how classes are numbered"
            )
    return scores, summary


def _all_encoders(models: Any) -> Encode:
    """Features of every model and of the pixels, by "model/pooling"."""
    encoders: dict[str, Encode] = {name: encoder_of(model) for name, model in models.items()}
    encoders["pixels"] = pixels

    def encode(pixel_values: Tensor) -> dict[str, Tensor]:
        return {
            f"{name}/{pooling}": value
            for name, encode in encoders.items()
            for pooling, value in encode(pixel_values).items()
        }

    return encode


def _counts(
    config: RunConfig, probing: Probing, tables: Mapping[str, FeatureTable | None], ranks: ProcessRanks
) -> dict[str, Any]:
    """How many images were scored, and how many could not be read. DataError where these are too many."""
    summary: dict[str, Any] = {"bad_samples": {}, "unlabelled": {}}
    for name, side, features in (("train", probing.train, tables["train"]), ("test", probing.test, tables["test"])):
        if side is None or features is None:
            continue
        of_ranks = ranks.gather((len(features), features.bad, features.unlabelled))
        summary[name], bad = sum(each[0] for each in of_ranks), sum((each[1] for each in of_ranks), Counter[str]())
        summary["bad_samples"][name] = dict(bad)
        summary["unlabelled"][name] = sum(each[2] for each in of_ranks)
        if summary["unlabelled"][name] and ranks.rank == 0:
            to_stderr(f"evaluation.{name}: {summary['unlabelled'][name]} images have no label and are left out")
        if bad.total() > max(3, config.data.max_bad_fraction * side.total):
            causes = ", ".join(f"{count} {cause}" for cause, count in bad.most_common())
            raise DataError(
                f"evaluation.{name}: {bad.total()} of {side.total} images cannot be read ({causes}): more than "
                f"data.max_bad_fraction={config.data.max_bad_fraction}; mend the shards or raise it"
            )
    return summary


def _own_scores_fit(subject: Subject, test: HeldOut) -> bool:
    """Whether there are scores by what the model was trained for: of any that hides patches, of a classifier on its
    classes."""
    config = subject.config
    if type(subject.models["trained"]) is ViTModel:
        return False
    names = config.model.id2label
    if config.objective.name != "classification" or not names or not test.class_names or names == test.class_names:
        return True
    to_stderr(
        f"the model's classes are {listed(names)}, those of evaluation.test {listed(test.class_names)}: its classifier "
        "is not scored; if they are the same in other words, set model.id2label to the latter"
    )
    return False


def _name(results: RunFolder, config: RunConfig, source: str, digest: str) -> None:
    """Let `vitscale sync` know these scores as a run of their own, below that of what was scored."""
    run, model = replace(config.run, name=f"{config.run.name}-evaluation"), replace(config.model, init_from=source)
    write_atomically(results.config, dump_config(replace(config, run=run, model=model)))
    results.clear_exit()
    results.write_exit(DONE, None, "evaluated")
    tags = {"vitscale.objective": config.objective.name, "vitscale.data": digest, "vitscale.version": __version__}
    Outbox(results.path, tags | {"vitscale.parent_checkpoint": source}).set_status("FINISHED")


def _is_labelled(config: RunConfig) -> bool:
    """Whether features are to be scored; else there are figures alone."""
    return bool(config.evaluation.test or config.evaluation.train or _splits(config))


def _takes_vectors(config: RunConfig) -> bool:
    """Whether labels are several numbers, which no probe of classes is for."""
    is_classes = problem_type(config) in (None, "single_label_classification")
    return config.objective.name == "classification" and not is_classes


def _title(config: RunConfig) -> str:
    return f"{config.run.name}: {config.objective.name}"


def _summary(folder: RunFolder) -> dict[str, Any]:
    return json.loads(folder.summary.read_text(encoding="utf-8")) if folder.summary.exists() else {}


def _write(results: RunFolder, evaluation: dict[str, Any]) -> None:
    """summary.json, and the scores as a row of evaluation.jsonl, at the step of the model; MLflow is fed from it."""
    summary, scores = _summary(results), evaluation["scores"]
    row = {f"evaluation/{kind}_{name}": value for name in scores for kind, value in scores[name].items()}
    row |= evaluation.get("test_scores", {})
    now = int(time.time() * 1000)
    JsonlFile(results.path / "evaluation.jsonl").append({"step": summary.get("steps", 0), **row, "time": now})
    write_atomically(results.summary, json.dumps(summary | {"evaluation": evaluation}, indent=2) + "\n")
