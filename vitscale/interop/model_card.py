"""README.md of a model on the hub: what it is and, where a run made it, from what, how, and how well it does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor

import vitscale
from vitscale.config.load import load_config
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig, as_dict
from vitscale.errors import CheckpointError
from vitscale.files.model_folder import as_text, read_json
from vitscale.models.configuration import ViTConfig
from vitscale.run_folder import RunFolder

# What a class is for, as the hub's tasks and in words.
_CLASSES = {
    "ViTForImageClassification": ("image-classification", "an image classifier"),
    "ViTMAEForPreTraining": ("image-feature-extraction", "a masked autoencoder (arXiv 2111.06377), for its encoder"),
    "ViTForMaskedImageModeling": ("image-feature-extraction", "pretrained by SimMIM (arXiv 2111.09886)"),
    "ViTForMultitaskPreTraining": ("image-feature-extraction", "pretrained by SimMIM and classification at once"),
}
_ENCODER = ("image-feature-extraction", "an image encoder")
_SECTIONS = ("model", "objective", "data", "augment", "optimizer", "train")  # the sections that a reader needs
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


class Model(Protocol):
    """Of a model's class in models/, which this room does not import, what a card tells of."""

    config: ViTConfig

    def parameters(self) -> Iterator[Tensor]: ...

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str) -> None: ...


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder tells of it."""

    config: RunConfig
    summary: Mapping[str, Any]  # empty before its end

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """CheckpointError where there is no run's folder."""
        folder = RunFolder(path)
        if not folder.config.is_file():
            raise CheckpointError(f"{path}: is no run's folder (it holds no {folder.config.name}); leave run out")
        summary = read_json(folder.summary) if folder.summary.is_file() else {}
        return cls(load_config(folder.config), summary)


def model_card(model: Model, repo_id: str, run: RunRecord | None, with_processor: bool) -> str:
    """The card's text, with the hub's YAML at the top. The license is left to whoever publishes.

    with_processor: whether the model's preprocessor_config.json lies beside the card.
    """
    task, what = _CLASSES.get(type(model).__name__, _ENCODER)
    config = model.config
    # Whether it has a class there that takes every tensor.
    in_transformers = not config.beyond_transformers and type(model).__name__ != "ViTForMultitaskPreTraining"
    front = {
        "library_name": "transformers" if in_transformers else "vitscale",
        "pipeline_tag": task,
        "tags": ["vitscale", "vision", config.saved_model_type],
    }
    (height, width), patch = pair(config.image_size), "x".join(map(str, pair(config.patch_size)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repo_id.rpartition('/')[2]}",
        f"A Vision Transformer, {what}: {parameters / 1e6:.1f}M parameters, images of {height}x{width} pixels and "
        f"{config.num_channels} channel(s) in patches of {patch}. Made by vitscale {vitscale.__version__}.",
        f"## Use\n```python\n{_usage(model, repo_id, in_transformers, with_processor)}\n```",
        *([] if run is None else _of_run(run)),
        f"## Config\n```json\n{as_text(config.content())}```",
        "## License\nNot stated. Whoever publishes this model adds `license: NAME` to the lines at the top.",
    ]
    return "\n\n".join(lines) + "\n"


def _usage(model: Model, repo_id: str, in_transformers: bool, with_processor: bool) -> str:
    classifies = type(model).__name__ == "ViTForImageClassification"
    call = "AutoModelForImageClassification" if classifies else "AutoModel"
    lines = ["", f'model = {call}.from_pretrained("{repo_id}")']
    if with_processor:
        lines = [f"from vitscale import AutoImageProcessor, {call}", *lines]
        lines += [f'processor = AutoImageProcessor.from_pretrained("{repo_id}")',
                  'inputs = processor("image.jpg", return_tensors="pt")']  # fmt: skip
    else:
        lines = ["import torch", f"from vitscale import {call}", *lines]
        size = (1, model.config.num_channels, *pair(model.config.image_size))
        lines.append(f'inputs = {{"pixel_values": torch.randn{size}}}  # images, normalized as in training')
    lines.append(f"outputs = model(**inputs).{'logits' if classifies else 'last_hidden_state'}")
    if in_transformers:
        lines.append(f"# transformers opens it too, as {type(model).__name__} or by its Auto classes")
    return "\n".join(lines)


def _of_run(run: RunRecord) -> Iterable[str]:
    config, summary = run.config, run.summary
    data, optimizer, train = config.data, config.optimizer, config.train
    patterns = "\n".join(f"- `{_public(source.pattern)}`" for source in data.train)
    yield f"## Data\nShards:\n{patterns}\n\n{_counts(config, summary)}"
    recipe = {
        "objective": config.objective.name,
        "steps": summary.get("steps", "not finished"),
        "images a step": train.global_batch,
        "learning rate": f"{optimizer.lr}" + (f" at {optimizer.lr_batch} images a step" if optimizer.lr_batch else ""),
        "optimizer": f"AdamW, betas {optimizer.betas}, weight decay {optimizer.weight_decay}",
        "weights": f"their moving average, decay {train.ema_decay}" if train.ema_decay is not None else None,
        "precision": train.precision,
        "seed": config.run.seed,
        "ranks and device": f"{summary['world_size']} x {summary['device']}" if "world_size" in summary else None,
        "last loss": summary.get("loss"),
        "trained by": f"vitscale {summary['vitscale']}" if "vitscale" in summary else None,
    }
    yield "## Recipe\n" + _table(("", ""), [(key, value) for key, value in recipe.items() if value is not None])
    if "evaluation" in summary:
        yield "## Scores\n" + _scores(summary["evaluation"])
    sections = {name: section for name, section in as_dict(config).items() if name in _SECTIONS}
    text = _public(yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=100))
    yield f"## The run's config\n<details><summary>Every key</summary>\n\n```yaml\n{text}```\n\n</details>"


def _counts(config: RunConfig, summary: Mapping[str, Any]) -> str:
    if "samples" not in summary:
        return "The run has not finished."
    an_epoch = f", of {summary['images']:,}" if "images" in summary else ""
    if not an_epoch and summary.get("epochs"):  # what an epoch leaves out at its end is no full batch
        an_epoch = f", about {round(summary['steps'] * config.train.global_batch / summary['epochs']):,} an epoch"
    bad = sum(summary.get("bad_samples", {}).values())
    return f"{summary['samples']:,} images seen{an_epoch}; {bad:,} of them bad and replaced."


def _scores(evaluation: Mapping[str, Any]) -> str:
    rows = [
        (name, *(f"{100 * row[kind]:.1f} ± {100 * row[f'{kind}_se']:.1f} %" for kind in ("linear_probe", "knn")))
        for name, row in evaluation["scores"].items()
    ]
    fitted = f"Frozen features, fitted on {evaluation['train']:,} and scored on {evaluation['test']:,} images"
    return f"{fitted}, with one standard error.\n\n{_table(('features', 'linear probe', 'kNN'), rows)}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _public(text: str) -> str:
    """Without users and passwords in URLs."""
    return _CREDENTIALS.sub("", text)
