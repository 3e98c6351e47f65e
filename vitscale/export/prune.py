"""Whole attention heads or MLP units taken out of every block: smaller matrices, hidden_size stays.

Every block loses as many, so that the config says it all. intermediate_size is known to whatever opens the model;
with fewer heads comes head_dim, which transformers' ViT reads from 5.9 on: versions before refuse the folder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitscale.errors import ConfigError
from vitscale.export.agreement import Labelled
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.embeddings import ViTEmbeddings
from vitscale.models.vit import ViTLayer, ViTPreTrainedModel

HEAD_DIM_SINCE = "5.9"  # of transformers
UNITS = 8  # MLP units are kept in such steps: a matrix that is no multiple of it is slow on a GPU


def prune(model: ViTPreTrainedModel, what: str, fraction: float, scores: list[Tensor]) -> ViTPreTrainedModel:
    """A copy without the least important heads or MLP units.

    what: "heads" or "mlp". fraction: in (0, 1), of those of each block; what stays is rounded to a whole head, one
    at least, or to a multiple of 8 units. scores: a block's importances [heads or units] for every block of the
    encoder, see `magnitudes` and `taylor`. ConfigError where nothing would go, and for the heads of an MAE.
    """
    if what == "heads" and isinstance(model.config, ViTMAEConfig):
        raise ConfigError(
            f"--prune heads: {type(model).__name__} has one head_dim for its encoder and its decoder, which keeps its "
            "heads; take mlp, or the encoder alone: ViTModel.from_pretrained(MODEL).save_pretrained(FOLDER)"
        )
    before = len(scores[0])
    step = min(UNITS, before) if what == "mlp" else 1
    stay = max(step, round(before * (1 - fraction) / step) * step)
    if not 0 < fraction < 1 or stay >= before:
        units = "attention heads" if what == "heads" else "MLP units"
        raise ConfigError(
            f"--prune {what} {fraction}: leaves {stay} of {before} {units} in each block; the fraction must lie "
            f"between 0 and 1 and take away {step} at least"
        )
    model = copy.deepcopy(model)
    config = model.config
    if what == "heads":
        config = replace(config, num_attention_heads=stay, head_dim=config.head_width)
    else:
        config = replace(config, intermediate_size=stay)
    for block, importance in zip(_blocks(model), scores, strict=True):
        _keep(block, what, importance.topk(stay).indices.sort().values)
    for module in model.modules():
        if isinstance(module, ViTPreTrainedModel | ViTEmbeddings):
            module.config = config
    return model


def opens_in(config: ViTConfig) -> str:
    """Which libraries open the folder of a pruned model."""
    if config.beyond_transformers:
        return "vitscale alone"
    if config.head_dim is None:
        return "vitscale and transformers"
    return f"vitscale, and in transformers {HEAD_DIM_SINCE} or later: its ViT has no head_dim before"


@torch.no_grad()
def magnitudes(model: ViTPreTrainedModel, what: str) -> list[Tensor]:
    """Importance by the weights alone, of every block: [heads] or [units].

    Of a head the norm of value and output projection as one matrix, of a unit the product of the norms of what
    comes in and what goes out.
    """
    scores = []
    for block in _blocks(model):
        if what == "heads":
            heads = block.attention.attention.num_attention_heads
            value = block.attention.attention.qkv.weight.chunk(3)[2].unflatten(0, (heads, -1))  # [heads, width, in]
            output = block.attention.output.weight.unflatten(1, (heads, -1)).transpose(0, 1)  # [heads, out, width]
            scores.append((output @ value).flatten(1).norm(dim=1))
        else:
            units = block.mlp.fc2.in_features
            incoming = block.mlp.fc1.weight.unflatten(0, (-1, units)).norm(dim=2).prod(dim=0)  # swiglu: two rows a unit
            scores.append(incoming * block.mlp.fc2.weight.norm(dim=0))
    return scores


def taylor(model: ViTPreTrainedModel, what: str, batches: Iterable[Labelled]) -> list[Tensor]:
    """Importance by what a loss would change: of every block [heads] or [units].

    The first-order term |sum of activation x gradient| over a head's or unit's outputs for one image, averaged over
    images (Molchanov et al. 2017, arXiv 1611.06440; of heads: Michel et al. 2019, arXiv 1905.10650). `batches`:
    pixels and labels of a classifier.
    """
    blocks = _blocks(model)
    heads = blocks[0].attention.attention.num_attention_heads
    outlets = [block.attention.output if what == "heads" else block.mlp.fc2 for block in blocks]
    seen: dict[nn.Module, Tensor] = {}

    def remember(outlet: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        seen[outlet] = inputs[0]

    hooks = [outlet.register_forward_pre_hook(remember) for outlet in outlets]
    totals, images = [torch.zeros(heads if what == "heads" else outlet.in_features) for outlet in outlets], 0
    try:
        for pixels, labels in batches:
            model.zero_grad()
            (model(pixel_values=pixels, labels=labels).loss * len(pixels)).backward()
            images += len(pixels)
            for outlet, total in zip(outlets, totals, strict=True):
                gradient = seen[outlet].grad
                assert gradient is not None, "the hook asked for it"
                term = (seen[outlet].detach() * gradient).sum(dim=1)  # [n, width], over tokens
                if what == "heads":
                    term = term.unflatten(1, (heads, -1)).sum(dim=2)
                total += term.abs().sum(dim=0)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return [total / images for total in totals]


def _keep(block: ViTLayer, what: str, kept: Tensor) -> None:
    """Cut a block down to `kept`: [heads or units that stay], sorted. A unit is like a head of width 1."""
    if what == "heads":
        attention = block.attention.attention
        incoming, outgoing, width = attention.qkv, block.attention.output, block.attention.output.in_features
        width //= attention.num_attention_heads
        attention.num_attention_heads = len(kept)
    else:
        incoming, outgoing, width = block.mlp.fc1, block.mlp.fc2, 1
    columns = (kept[:, None] * width + torch.arange(width)).flatten()
    parts = range(0, incoming.out_features, outgoing.in_features)  # query, key, value; with swiglu gate and value
    _keep_rows(incoming, torch.cat([start + columns for start in parts]))
    _keep_columns(outgoing, columns)


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[rows].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[:, columns].clone())
    linear.in_features = len(columns)


def _blocks(model: ViTPreTrainedModel) -> list[ViTLayer]:
    """Of the encoder; a decoder's are not served."""
    return [block for block in model.base_model.blocks() if isinstance(block, ViTLayer)]
