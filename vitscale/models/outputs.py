"""What a model returns: fields by name, in a dict that every wrapper can look into."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor


class Output(OrderedDict[str, Any]):
    """Fields as attributes and as dict entries, like transformers' ModelOutput.

    A dict, because DeepSpeed's ZeRO-3 and accelerate look for tensors only in tuples, lists and
    dicts. A field that is None is not an entry: its attribute reads None.
    """

    def __init__(self, *mapping: Any, **fields: Any) -> None:
        super().__init__(*mapping)
        self.update((name, value) for name, value in fields.items() if value is not None)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in type(self).__annotations__:
            return None
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self)}")


class EncoderOutput(Output):
    last_hidden_state: Tensor  # [n, 1 + patches, width]
    hidden_states: tuple[Tensor, ...] | None  # the embeddings, then what each block gave
    attentions: tuple[Tensor, ...] | None  # a block: [n, heads, tokens, tokens]


class ViTModelOutput(Output):
    last_hidden_state: Tensor  # [n, 1 + patches, width], after the last layer norm
    pooler_output: Tensor | None  # [n, pooler_output_size]
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class ClassificationOutput(Output):
    loss: Tensor | None
    logits: Tensor  # [n, num_labels]; with num_labels=0 the cls token's features
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    metrics: dict[str, Tensor]


class MaskedImageModelingOutput(Output):
    loss: Tensor | None
    reconstruction: Tensor  # [n, channels, height, width]
    bool_masked_pos: Tensor | None  # [n, patches], True where hidden
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    metrics: dict[str, Tensor]


class MultitaskOutput(Output):
    loss: Tensor | None
    reconstruction: Tensor  # [n, channels, height, width]
    logits: Tensor  # [n, num_labels]
    bool_masked_pos: Tensor | None  # [n, patches], True where hidden
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    metrics: dict[str, Tensor]


class MAEOutput(Output):
    loss: Tensor
    logits: Tensor  # [n, patches, pixels of a patch x channels]
    mask: Tensor  # [n, patches], 1 where hidden
    ids_restore: Tensor  # [n, patches]: the place of each patch in the shuffled order
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    metrics: dict[str, Tensor]
