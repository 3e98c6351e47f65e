"""`vitscale evaluate RUN_FOLDER`: frozen features of a finished run scored on held-out images, and its figures.

One process, no second loop: the same shards, decoder and resize as in training, with a centre crop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitscale.augment.pipeline import Augment
from vitscale.config.check import pair
from vitscale.config.load import load_config
from vitscale.config.schema import RunConfig, Source
from vitscale.data.crop import CenterCrop
from vitscale.data.index import ShardIndex, open_index, require_labels
from vitscale.data.loader import Loader
from vitscale.data.order import SequentialOrder
from vitscale.errors import CheckpointError, ConfigError
from vitscale.evaluation.features import Features, extract, pixels, pooled
from vitscale.evaluation.figures import draw_curves, draw_reconstructions, reconstruct
from vitscale.evaluation.scores import score_features
from vitscale.interop.pretrained import load_model
from vitscale.models.auto import build_model, initialize
from vitscale.run_folder import RunFolder, write_atomically
from vitscale.tracking.jsonl import JsonlFile
from vitscale.world import World

SHOWN = 12  # images in the figure of reconstructions

Batches = Iterator[tuple[torch.Tensor, np.ndarray, np.ndarray]]


def evaluate(folder: RunFolder, world: World) -> dict[str, dict[str, float]]:
    """Score the trained encoder, the same encoder untrained, and raw pixels; draw figures; write summary.json.

    Returns {features' name: {linear_probe, linear_probe_se, knn, knn_se}}.
    """
    if not folder.config.exists() or not (folder.model / "config.json").exists():
        raise CheckpointError(
            f"{folder.path}: is no finished run (no config.yaml or model/ in it); let it end, "
            f"or make model/ from its newest checkpoint with `vitscale export {folder.path}`"
        )
    config = load_config(folder.config)
    evaluation = config.evaluation
    if not evaluation.test:
        raise ConfigError(
            "evaluation.test is empty: give held-out labelled shards, as `vitscale pack --held-out` makes them"
        )
    device = torch.device(world.device)
    model = load_model(folder.model).to(device)
    untrained = build_model(config)
    initialize(untrained, config.run.seed)
    models = {"trained": model, "untrained": untrained.to(device)}
    encoders = {name: pooled(each.get_submodule("vit")) for name, each in models.items()} | {"pixels": pixels()}

    train = _features(encoders, evaluation.train or config.data.train, config, world, folder.path)
    test = _features(encoders, evaluation.test, config, world, folder.path)
    scores = {
        name: score_features(
            train.values[name], train.labels, test.values[name], test.labels, evaluation.neighbours
        )
        for name in encoders
    }
    _draw(folder, config, model, world)
    _record(folder, scores)
    summary = json.loads(folder.summary.read_text(encoding="utf-8")) if folder.summary.exists() else {}
    summary["evaluation"] = {"train": len(train.labels), "test": len(test.labels), "scores": scores}
    write_atomically(folder.summary, json.dumps(summary, indent=2) + "\n")
    return scores


def _record(folder: RunFolder, scores: dict[str, dict[str, float]]) -> None:
    """The scores as a row of evaluation.jsonl, at the step that the run has reached; MLflow is fed from it."""
    rows = JsonlFile(folder.metrics).rows()
    row = {f"evaluation/{kind}_{name}": scores[name][kind] for name in scores for kind in ("linear_probe", "knn")}
    step = rows[-1]["step"] if rows else 0
    JsonlFile(folder.path / "evaluation.jsonl").append({"step": step, **row, "time": int(time.time() * 1000)})


def _features(
    encoders: dict[str, Any], sources: tuple[Source, ...], config: RunConfig, world: World, cache: Path
) -> Features:
    index = open_index(sources, None, cache)
    require_labels(index, config.data.label)
    return extract(encoders, _batches(index, config, world))


def _batches(index: ShardIndex, config: RunConfig, world: World) -> Batches:
    """Every sample of the index, in its order, the last batch padded: (pixel_values, labels, sample ids)."""
    size = pair(config.model.image_size)
    augment = Augment(config.augment, size, config.model.num_channels, world.device, train=False)
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
        for _ in range(-(-index.total // batch)):
            decoded = next(loader)
            yield augment(decoded), decoded.labels, decoded.sample_ids


def _draw(folder: RunFolder, config: RunConfig, model: Any, world: World) -> None:
    """figures/loss.png, and figures/reconstructions.png where the objective hides patches."""
    title = f"{config.run.name}: {config.objective.name}"
    draw_curves(JsonlFile(folder.metrics).rows(), folder.figures / "loss.png", title)
    if config.objective.name == "classification":
        return
    index = open_index(config.evaluation.test, None, folder.path)
    batches = _batches(index, config, world)
    pixel_values, _, ids = next(batches)
    batches.close()  # type: ignore[attr-defined]
    key = torch.from_numpy(np.array(ids[:SHOWN])).to(pixel_values.device)
    panels = reconstruct(model, pixel_values[:SHOWN], key, config.augment.mean, config.augment.std)
    draw_reconstructions(panels, folder.figures / "reconstructions.png", f"{title}, held-out images")


def as_table(scores: dict[str, dict[str, float]]) -> str:
    """The scores as lines for the terminal, in percent with one standard error."""
    lines = [f"{'features':<12}{'linear probe':>18}{'kNN':>18}"]
    for name, row in scores.items():
        cells = [f"{100 * row[key]:.1f} +- {100 * row[f'{key}_se']:.1f} %" for key in ("linear_probe", "knn")]
        lines.append(f"{name:<12}{cells[0]:>18}{cells[1]:>18}")
    return "\n".join(lines)
