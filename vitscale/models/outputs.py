"""What a model returns: fields by name, in a dict that every wrapper can look into."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor


class Output(OrderedDict[str, Any]):
    """Fields as attributes, as dict entries and by place, like transformers' ModelOutput.

    A dict, because DeepSpeed's ZeRO-3 and accelerate look for tensors only in tuples, lists and
    dicts. A field that is None is not an entry: its attribute reads None. As a tuple it has the
    fields of transformers' output in its order, without those that are ours alone.
    """

    ours: ClassVar[frozenset[str]] = frozenset({"metrics"})

    def __init__(self, *mapping: Any, **fields: Any) -> None:
        super().__init__(*mapping)
        self.update((name, value) for name, value in fields.items() if value is not None)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in type(self).__annotations__:
            return None
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self)}")

    def __getitem__(self, key: str | int | slice) -> Any:
        """A field by its name, or by its place among those of `to_tuple`."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for name, value in self.items() if name not in self.ours)


_Forward = TypeVar("_Forward", bound=Callable[..., Output])


def can_return_tuple(forward: _Forward) -> _Forward:
    """Let a model's forward take transformers' `return_dict`: False gives the tuple; and let the
    config say output_attentions and output_hidden_states where the call does not."""

    @wraps(forward)
    def wrapped(model: Any, *args: Any, return_dict: bool | None = None, **options: Any) -> Any:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(model.config, name) and options.get(name) is None:
                options[name] = True
        output = forward(model, *args, **options)
        return output.to_tuple() if return_dict is False else output

    return cast(_Forward, wrapped)


class EncoderOutput(Output):
    last_hidden_state: Tensor  # [n, tokens, width]
    hidden_states: tuple[Tensor, ...] | None  # the embeddings, then what each block gave
    attentions: tuple[Tensor, ...] | None  # a block: [n, heads, tokens, tokens]


class ViTModelOutput(Output):
    last_hidden_state: Tensor  # [n, tokens, width], after the last layer norm
    pooler_output: Tensor | None  # [n, pooler_output_size]
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class ClassificationOutput(Output):
    ours = Output.ours | {"last_hidden_state"}

    loss: Tensor | None
    logits: Tensor  # [n, num_labels]; with num_labels=0 the pooled features [n, width]
    last_hidden_state: Tensor | None  # with num_labels=0: [n, tokens, width]
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    metrics: dict[str, Tensor]


class MaskedImageModelingOutput(Output):
    ours = Output.ours | {"bool_masked_pos"}

    loss: Tensor | None
    reconstruction: Tensor  # [n, channels, height, width]
    bool_masked_pos: Tensor | None  # [n, patches], True where hidden
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    metrics: dict[str, Tensor]


class MultitaskOutput(Output):
    ours = Output.ours | {"bool_masked_pos"}

    loss: Tensor | None
    reconstruction: Tensor  # [n, channels, height, width]
    logits: Tensor  # [n, num_labels]
    last_hidden_state: Tensor  # [n, tokens, width]: the features
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
