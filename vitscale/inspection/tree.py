"""What a model is made of: its modules as a tree, with shapes, parameters and FLOPs of one image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitscale.config.model_rules import pair
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.text import aligned

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A module, or `copies` consecutive ones that are alike in all but their values; figures are of one of them."""

    name: str  # "" for the model itself; "layers.0-11" for twelve alike
    kind: str  # its class
    parameters: dict[str, Shape]  # its own, without its children's
    tables: dict[str, Shape]  # buffers of its own: fixed numbers, say sincos positions
    output: Shape | None  # of one image, without the batch; None where the forward does not run it
    flops: int  # of one image's forward, as torch's own counter sees it
    children: tuple[Node, ...] = ()
    copies: int = 1

    @property
    def own(self) -> int:
        """Numbers in its own parameters."""
        return sum(torch.Size(shape).numel() for shape in self.parameters.values())

    @property
    def total(self) -> int:
        """Numbers in its parameters and its children's."""
        return self.own + sum(child.copies * child.total for child in self.children)


def module_tree(model: ViTPreTrainedModel) -> Node:
    """The tree of `model`, whose weights are left alone: one forward without memory (meta tensors) tells all.

    Modules of a list stand under the list's parent, and runs of alike ones are one node.
    """
    return _node(model, "", type(model).__name__, *_trace(model))


def as_table(tree: Node, depth: int | None = None) -> str:
    """The tree as text, a line a node; `depth` levels below the model (None: all)."""
    unit, name = flop_unit(tree)
    rows = [("module", "kind", "output", "own", "total", name, "shapes of its own")]
    for node, level in _walk(tree, 0, depth):
        label = "  " * (level - 1) + node.name if level else "(model)"
        many = f" (each of {node.copies})" if node.copies > 1 else ""
        rows.append((
            label + many,
            node.kind,
            "" if node.output is None else _times(node.output),
            f"{node.own:,}" if node.own else "",
            f"{node.total:,}" if node.total else "",
            f"{node.flops / unit:,.3f}" if node.flops else "",
            _shapes(node),
        ))  # fmt: skip
    return aligned(rows, right=(3, 4, 5))


def flop_unit(tree: Node) -> tuple[float, str]:
    """What to count this model's operations in: operations and name."""
    return (1e9, "GFLOP") if tree.flops >= 1e9 else (1e6, "MFLOP")


def _trace(model: ViTPreTrainedModel) -> tuple[dict[nn.Module, Shape], dict[str, int]]:
    """One image through `model` on meta tensors, in evaluation mode: the modules' outputs, and operations by
    "Class.path.of.module"."""
    outputs: dict[nn.Module, Shape] = {}
    config = model.config
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    without_memory = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    image = torch.empty(1, config.num_channels, *pair(config.image_size), device="meta")

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        shape = _first_shape(output)
        if shape is not None:
            outputs[module] = shape

    handles = [module.register_forward_hook(note) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, without_memory, (image,))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return outputs, {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def _first_shape(output: Any) -> Shape | None:
    """The shape, without the batch, of the first tensor that is no single number (a loss is)."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    return next((tuple(value.shape[1:]) for value in values if isinstance(value, Tensor) and value.ndim), None)


def _node(module: nn.Module, name: str, path: str, outputs: dict[nn.Module, Shape], flops: dict[str, int]) -> Node:
    children = [_node(child, label, f"{path}.{label}", outputs, flops) for label, child in _children(module)]
    return Node(
        name=name,
        kind=type(module).__name__,
        parameters={label: tuple(each.shape) for label, each in module.named_parameters(recurse=False)},
        tables={label: tuple(each.shape) for label, each in module.named_buffers(recurse=False)},
        output=outputs.get(module),
        flops=flops.get(path, 0),
        children=tuple(_folded(children)),
    )


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """By name; a list's modules stand for the list, which runs nothing itself, and what does nothing is left out."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{place}", each) for place, each in enumerate(child))
        elif not isinstance(child, nn.Identity):
            yield name, child


def _folded(nodes: list[Node]) -> list[Node]:
    """Runs of alike nodes of one list as one node each."""
    folded: list[Node] = []
    for node in nodes:
        last = folded[-1] if folded else node
        base, dot, place = node.name.rpartition(".")
        in_one_list = dot and last.name.rpartition(".")[0] == base
        if folded and in_one_list and replace(last, name="", copies=1) == replace(node, name="", copies=1):
            first = last.name.rpartition(".")[2].split("-")[0]
            folded[-1] = replace(last, name=f"{base}.{first}-{place}", copies=last.copies + 1)
        else:
            folded.append(node)
    return folded


def _walk(node: Node, level: int, depth: int | None) -> Iterator[tuple[Node, int]]:
    yield node, level
    if depth is None or level < depth:
        for child in node.children:
            yield from _walk(child, level + 1, depth)


def _shapes(node: Node) -> str:
    tables = {f"{name} (fixed)": shape for name, shape in node.tables.items()}
    return ", ".join(f"{name} {_times(shape)}" for name, shape in {**node.parameters, **tables}.items())


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "1"
