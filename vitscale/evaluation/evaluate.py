"""`vitscale evaluate RUN_FOLDER`: frozen features of a finished run scored on held-out images, and its figures.

One process, no second loop: the same shards, decoder and resize as in training, with a centre crop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from vitscale.augment.pipeline import Augment
from vitscale.config.load import load_config
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig
from vitscale.data.crop import CenterCrop
from vitscale.data.index import ShardIndex, open_index, require_labels
from vitscale.data.loader import Loader
from vitscale.data.order import SequentialOrder
from vitscale.engine.guard import SampleGuard
from vitscale.errors import CheckpointError, ConfigError
from vitscale.evaluation.features import Features, extract, pixels, pooled
from vitscale.evaluation.figures import SHOWN, draw_curves, draw_reconstructions, reconstruct
from vitscale.evaluation.scores import score_features
from vitscale.files.atomic import write_atomically
from vitscale.interop.pretrained import load_model
from vitscale.models.auto import new_model
from vitscale.run_folder import RunFolder
from vitscale.tracking.jsonl import JsonlFile
from vitscale.world import World

Scores = dict[str, dict[str, float]]
Batches = Iterator[tuple[torch.Tensor, np.ndarray, np.ndarray]]


def evaluate(folder: RunFolder, world: World, overrides: Sequence[str] = ()) -> Scores:
    """Draw the run's figures, then score the trained encoder, the same encoder untrained, and raw pixels.

    `overrides`: of the run's config, for keys of `evaluation`. Writes figures/, evaluation.jsonl and
    summary.json; returns {features' name: {linear_probe, linear_probe_se, knn, knn_se}}.
    """
    if not folder.config.exists() or not (folder.model / "config.json").exists():
        raise CheckpointError(
            f"{folder.path}: is no finished run (no config.yaml or model/ in it); let it end, "
            f"or make model/ from its newest checkpoint with `vitscale export {folder.path}`"
        )
    config = load_config(folder.config, overrides)
    evaluation = config.evaluation
    device = torch.device(world.device)
    model = load_model(folder.model).to(device)
    _draw(folder, config, model, world)
    if not evaluation.test:
        raise ConfigError(
            f"evaluation.test is empty: figures are in {folder.figures}, but features are scored on held-out labelled "
            "shards, as `vitscale pack --held-out` makes them: add evaluation.test='FOLDER/test/*.tar'"
        )
    models = {"trained": model, "untrained": new_model(config, config.run.seed).to(device)}
    encoders = {name: pooled(each.get_submodule("vit")) for name, each in models.items()} | {"pixels": pixels()}
    bad = {name: SampleGuard(config.data.max_bad_fraction, {}) for name in ("train", "test")}
    label, indexed = config.data.label_extension, None if evaluation.train else config.data.index
    index = open_index(evaluation.train or config.data.train, indexed, folder.path, label=label)
    train = _features(encoders, index, config, world, bad["train"])
    index = open_index(evaluation.test, None, folder.path, label=label)
    test = _features(encoders, index, config, world, bad["test"])
    scores = {
        name: score_features(train.values[name], train.labels, test.values[name], test.labels, evaluation.neighbours)
        for name in encoders
    }
    summary = _summary(folder)
    _record(folder, summary, scores)
    summary["evaluation"] = {
        "train": len(train.labels),
        "test": len(test.labels),
        "bad_samples": {name: dict(guard.counts) for name, guard in bad.items()},
        "scores": scores,
    }
    write_atomically(folder.summary, json.dumps(summary, indent=2) + "\n")
    return scores


def saved_scores(folder: RunFolder) -> Scores:
    """The scores that an earlier evaluation left in summary.json."""
    summary = _summary(folder)
    if "evaluation" not in summary:
        raise CheckpointError(f"{folder.summary}: holds no scores yet; `vitscale evaluate {folder.path}` makes them")
    return summary["evaluation"]["scores"]


def _summary(folder: RunFolder) -> dict[str, Any]:
    return json.loads(folder.summary.read_text(encoding="utf-8")) if folder.summary.exists() else {}


def _record(folder: RunFolder, summary: dict[str, Any], scores: Scores) -> None:
    """The scores as a row of evaluation.jsonl, at the step of the model; MLflow is fed from it."""
    row = {f"evaluation/{kind}_{name}": scores[name][kind] for name in scores for kind in ("linear_probe", "knn")}
    time_ms = int(time.time() * 1000)
    JsonlFile(folder.path / "evaluation.jsonl").append({"step": summary.get("steps", 0), **row, "time": time_ms})


def _features(
    encoders: dict[str, Any], index: ShardIndex, config: RunConfig, world: World, bad: SampleGuard
) -> Features:
    require_labels(index, config.data.label_extension)
    return extract(encoders, _batches(index, config, world, bad))


def _example(replaced: Sequence[Any]) -> str:
    return str(replaced[0])


def _batches(index: ShardIndex, config: RunConfig, world: World, bad: SampleGuard) -> Batches:
    """Every sample of the index, in its order, the last batch padded: (pixel_values, labels, sample ids).

    Others stand in for bad samples, which are counted in `bad`, and bounded as in training.
    """
    size = pair(config.model.image_size)
    augment = Augment.of(config, world.device, train=False)
    batch = min(config.evaluation.batch, index.total)
    loader = Loader(
        index=index,
        order=SequentialOrder(index.samples, batch),
        crop=CenterCrop(config.evaluation.crop_fraction, size[1] / size[0]),
        data=config.data,
        num_channels=config.model.num_channels,
        seed=config.run.seed,
        world=world,
        global_batch=batch,
        micro_batch=batch,
        start=0,
        image_size=size,
    )
    with loader:
        for number, decoded in enumerate(loader, start=1):
            bad.note((each.cause for each in decoded.replaced), number * batch, partial(_example, decoded.replaced))
            yield augment(decoded).pixel_values, decoded.labels, decoded.sample_ids
            loader.release(decoded)  # not before: on a GPU its pixels may still be on their way


def _draw(folder: RunFolder, config: RunConfig, model: Any, world: World) -> None:
    """figures/loss.png, and figures/reconstructions.png where the objective hides patches."""
    title = f"{config.run.name}: {config.objective.name}"
    draw_curves(JsonlFile(folder.metrics).rows(), folder.figures / "loss.png", title)
    if config.objective.name == "classification":
        return
    sources = config.evaluation.test
    path = None if sources else config.data.index
    index = open_index(sources or config.data.train, path, folder.path, label=config.data.label_extension)
    batches = _batches(index, config, world, SampleGuard(1.0, {}))
    pixel_values, _, ids = next(batches)
    batches.close()  # type: ignore[attr-defined]
    key = torch.from_numpy(np.array(ids[:SHOWN])).to(pixel_values.device)
    panels = reconstruct(model, pixel_values[:SHOWN], key, config.augment.mean, config.augment.std)
    shown = "held-out" if sources else "training"
    draw_reconstructions(panels, folder.figures / "reconstructions.png", f"{title}, {shown} images")


def as_table(scores: Scores) -> str:
    """The scores as lines for the terminal, in percent with one standard error."""
    lines = [f"{'features':<12}{'linear probe':>18}{'kNN':>18}"]
    for name, row in scores.items():
        cells = [f"{100 * row[key]:.1f} +- {100 * row[f'{key}_se']:.1f} %" for key in ("linear_probe", "knn")]
        lines.append(f"{name:<12}{cells[0]:>18}{cells[1]:>18}")
    return "\n".join(lines)
