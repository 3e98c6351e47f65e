"""How strongly each layer is pulled: gradient norms of one backward of the model's own loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from vitscale.errors import ConfigError
from vitscale.models.losses import problem_type
from vitscale.models.vit import ViTLayer, ViTModel, ViTPreTrainedModel
from vitscale.text import aligned

ATTENTION, MLP, REST = "#1f5fa8", "#b4551e", "#8a8a8a"
_PART_OF = {"layernorm_before": "attention", "layer_scale_before": "attention", "attention": "attention"}
_PART_OF |= {"layernorm_after": "mlp", "layer_scale_after": "mlp", "mlp": "mlp"}


@dataclass(frozen=True)
class LayerGradient:
    """The gradient of a block, or of a module beside the blocks, as Euclidean norms."""

    name: str
    norm: float  # NaN or infinite where the gradient is
    attention: float | None  # the share of a block's attention with the norm before it; None beside the blocks
    mlp: float | None
    weights: float  # norm of the parameters themselves
    unused: int  # parameters without a gradient: frozen, or out of the loss

    @property
    def is_block(self) -> bool:
        return self.attention is not None

    @property
    def relative(self) -> float | None:
        """The gradient's norm over the weights'; None where these are all 0."""
        return self.norm / self.weights if self.weights else None


@dataclass(frozen=True)
class Gradients:
    loss: float
    norm: float  # of all together
    layers: list[LayerGradient]  # in the order of the forward


def gradient_norms(model: ViTPreTrainedModel, pixel_values: Tensor, labels: Tensor | None = None) -> Gradients:
    """One forward and backward in training mode; the model's own gradients and mode are as before.

    pixel_values: [n, channels, height, width]; labels: what the model's problem type asks for, drawn at
    random where None. What is hidden or dropped follows from the samples' numbers 0 to n - 1. Raises
    ConfigError for a model without a loss.
    """
    inputs = {"pixel_values": pixel_values, "sample_key": torch.arange(len(pixel_values), device=pixel_values.device)}
    if _takes_labels(model):
        labels = random_labels(model, len(pixel_values)) if labels is None else labels
        inputs["labels"] = labels.to(pixel_values.device)
    elif labels is not None:
        raise ConfigError(f"labels: {type(model).__name__} takes none; leave them away")
    named = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    was_training = model.training
    model.train()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of dropout, where the config has it
            loss = model(**inputs).loss
            computed = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    finally:
        model.train(was_training)
    gradients = dict(zip(trained, computed, strict=True))
    layers = [_layer(name, group, named, gradients) for name, group in _groups(model).items()]
    return Gradients(float(loss.detach()), _norm([each for each in computed if each is not None]), layers)


def random_labels(model: ViTPreTrainedModel, count: int) -> Tensor:
    """Labels [count] or [count, num_labels] of the model's problem type, the same at every call."""
    generator, classes = torch.Generator().manual_seed(0), model.config.num_labels
    problem = problem_type(model.config)
    if problem == "single_label_classification":
        return torch.randint(classes, (count,), generator=generator)
    if problem == "multi_label_classification":
        return torch.randint(2, (count, classes), generator=generator).float()
    return torch.randn((count,) if classes == 1 else (count, classes), generator=generator)


def as_table(gradients: Gradients) -> str:
    """A line a layer."""
    rows: list[tuple[str, ...]] = [("layer", "gradient", "attention", "mlp", "weights", "gradient/weights", "")]
    for layer in gradients.layers:
        numbers = (layer.norm, layer.attention, layer.mlp, layer.weights, layer.relative)
        cells = ["" if number is None else f"{number:.3g}" for number in numbers]
        rows.append((layer.name, *cells, _remark(layer)))
    summary = f"loss {gradients.loss:.4g}; gradient norm of all layers together {gradients.norm:.4g}"
    return f"{aligned(rows, right=range(1, 6))}\n{summary}"


def draw(gradients: Gradients, path: Path, title: str = "") -> None:
    """The norms as bars, as PNG: a block's attention and MLP beside each other."""
    layers = gradients.layers
    figure = Figure(figsize=(max(6.0, 0.42 * len(layers) + 2.0), 4.6), layout="constrained")
    axes = figure.subplots()
    drawn: list[float] = []
    for place, layer in enumerate(layers):
        parts = [(layer.attention, ATTENTION), (layer.mlp, MLP)] if layer.is_block else [(layer.norm, REST)]
        width = 0.8 / len(parts)
        for number, (height, colour) in enumerate(parts):
            if height is not None and math.isfinite(height) and height > 0:
                axes.bar(place + (number - (len(parts) - 1) / 2) * width, height, width, color=colour)
                drawn.append(height)
            else:
                axes.text(place, 0.02, "0" if height == 0 else "not finite", transform=axes.get_xaxis_transform(),
                          ha="center", fontsize=8, color=REST, rotation=90)  # fmt: skip
    if drawn and max(drawn) > 50 * min(drawn):
        axes.set_yscale("log")
        axes.set_ylim(min(drawn) / 2, max(drawn) * 2)
    _dress(axes, [layer.name for layer in layers])
    heading = f"loss {gradients.loss:.4g}, norm of all layers together {gradients.norm:.4g}"
    axes.set_title("\n".join(line for line in (title, heading) if line), loc="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _dress(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_ylabel("norm of the gradient")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    colours = {"attention, with its LayerNorm": ATTENTION, "MLP, with its LayerNorm": MLP, "beside the blocks": REST}
    axes.legend(handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
                loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)  # fmt: skip


def _takes_labels(model: ViTPreTrainedModel) -> bool:
    if isinstance(model, ViTModel):
        raise ConfigError(
            "ViTModel has no loss, so no gradients; give a model with a head or decoder, say the run's own model folder"
        )
    if not hasattr(model, "classifier"):
        return False
    if not model.config.num_labels:
        raise ConfigError("num_labels=0: the model gives features and has no loss; give it a head: num_labels=N")
    return True


def _groups(model: ViTPreTrainedModel) -> dict[str, list[str]]:
    """Parameter names by layer: a block is one, and so is every module beside the blocks."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, ViTLayer)]
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        block = next((each for each in blocks if name.startswith(f"{each}.")), None)
        groups.setdefault(block or _beside(name), []).append(name)
    return {_short(name): each for name, each in groups.items()}


def _short(name: str) -> str:
    return name.removeprefix("vit.").replace("encoder.layers.", "layers.").replace("transformer.layers.", "layers.")


def _beside(name: str) -> str:
    """The embeddings are one layer; elsewhere the module, or the parameter that has none, is."""
    before, in_embeddings, _ = name.partition("embeddings.")
    if in_embeddings:
        return f"{before}embeddings"
    return name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name


def _layer(
    name: str, group: list[str], parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> LayerGradient:
    used = {each: gradient for each in group if (gradient := gradients.get(each)) is not None}
    parts: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
    for each, gradient in used.items():
        # In a block: encoder.layers.3.mlp.fc1.weight -> mlp.
        _, _, inside = each.partition(".layers.")
        if inside:
            parts[_PART_OF[inside.split(".")[1]]].append(gradient)
    is_block = any(".layers." in each for each in group)
    return LayerGradient(
        name=name,
        norm=_norm(list(used.values())),
        attention=_norm(parts["attention"]) if is_block else None,
        mlp=_norm(parts["mlp"]) if is_block else None,
        weights=_norm([parameters[each].detach() for each in group]),
        unused=len(group) - len(used),
    )


def _norm(tensors: Sequence[Tensor]) -> float:
    squares = [tensor.double().square().sum() for tensor in tensors]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _remark(layer: LayerGradient) -> str:
    if not math.isfinite(layer.norm):
        return "not finite"
    return f"{layer.unused} of its parameters have no gradient" if layer.unused else ""
