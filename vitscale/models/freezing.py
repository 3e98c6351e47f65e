"""Which parameters train.freeze leaves as they are, and how deep in the encoder each parameter lies."""

from __future__ import annotations

from vitscale.models.vit import ViTPreTrainedModel


def freeze(model: ViTPreTrainedModel, blocks: int) -> None:
    """Leave the embeddings and the first `blocks` as they are; -1: the whole encoder, 0: nothing."""
    most = model.config.num_hidden_layers if blocks < 0 else blocks
    for name, parameter in model.named_parameters():
        lies_in = depth(name, model.config.num_hidden_layers)
        is_frozen = (blocks != 0 and lies_in <= most) or (blocks < 0 and name.startswith("vit."))
        parameter.requires_grad_(not is_frozen)


def depth(name: str, layers: int) -> int:
    """Of a parameter: 0 for the embeddings, i + 1 for block i, layers + 1 for what comes after."""
    if name.startswith("vit.embeddings."):
        return 0
    prefix = "vit.encoder.layers."
    return int(name.removeprefix(prefix).partition(".")[0]) + 1 if name.startswith(prefix) else layers + 1
