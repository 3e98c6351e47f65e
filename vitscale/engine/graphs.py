"""Transformer blocks replayed by CUDA graphs: for steps whose kernels are shorter than the host needs to start them.

Each block has a graph of its forward and one of its backward, so that gradients still come block by block and are
reduced beside the backward of the blocks before. All graphs of an encoder are captured at its first training step, the
forwards in order and the backwards in reverse, and share a pool of memory, in which a replay must keep that order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitscale.models.positions import Rotary
from vitscale.models.vit import ViTEncoder

_WARM_UP = 2  # runs of a block before its capture: whatever compiles or tunes itself has done so then


def graph_blocks(model: nn.Module, accumulates: bool) -> None:
    """Let all blocks of a model train by CUDA graphs; see BlockGraphs."""
    for encoder in model.modules():
        if isinstance(encoder, ViTEncoder):
            BlockGraphs(list(encoder.layers), accumulates)


@dataclass(eq=False)
class _Captured:
    """A block's graphs and the memory that they read and write."""

    inputs: list[Tensor]  # of its forward
    parameters: list[Tensor]  # that are trained
    forward: torch.cuda.CUDAGraph
    output: Tensor
    output_gradient: Tensor
    backward: torch.cuda.CUDAGraph
    gradients: list[Tensor | None]  # of inputs, then of parameters
    under_way: bool = False  # between its forward and its backward


class BlockGraphs:
    """Lets the blocks of one encoder train by CUDA graphs: replaces their `forward`.

    A call that no graph can do takes the block's own forward: in evaluation, with attention weights, or a second one
    before the backward of the first. For inputs of another kind, or weights in another place, there are other graphs.
    """

    def __init__(self, blocks: Sequence[nn.Module], accumulates: bool) -> None:
        """accumulates: whether the gradients of several micro-batches are summed; each then needs its own memory."""
        self._blocks, self._accumulates = blocks, accumulates
        self._forwards = [block.forward for block in blocks]
        self._graphs: dict[tuple[Any, ...], list[_Captured]] = {}
        self._current: list[_Captured] = []
        for number, block in enumerate(blocks):
            block.forward = partial(self._call, number)

    def _call(
        self,
        number: int,
        x: Tensor,
        branch_scale: Tensor | None = None,
        rotary: Rotary | None = None,
        output_attentions: bool = False,
    ) -> Any:
        trains = self._blocks[number].training and torch.is_grad_enabled() and not output_attentions
        if trains:
            if number == 0:
                self._current = self._graphs_of(x, branch_scale, rotary)
            captured = self._current[number]
            if not captured.under_way:
                inputs = _tensors(x, branch_scale, rotary)
                return _Replay.apply(captured, self._accumulates, *inputs, *captured.parameters)
        return self._forwards[number](x, branch_scale, rotary, output_attentions)

    def _graphs_of(self, x: Tensor, branch_scale: Tensor | None, rotary: Rotary | None) -> list[_Captured]:
        """The graphs of all blocks for inputs like these of the first."""
        trained: list[list[Tensor]] = [[p for p in block.parameters() if p.requires_grad] for block in self._blocks]
        places = tuple(p.data_ptr() for parameters in trained for p in parameters)
        inputs = tuple((each.shape, each.dtype, each.requires_grad) for each in _tensors(x, branch_scale, rotary))
        kind = (places, branch_scale is None, inputs)
        if kind not in self._graphs:
            self._graphs = {key: graphs for key, graphs in self._graphs.items() if key[0] == places}
            self._graphs[kind] = self._capture(trained, x, branch_scale, rotary)
        return self._graphs[kind]

    def _capture(
        self, trained: Sequence[list[Tensor]], x: Tensor, branch_scale: Tensor | None, rotary: Rotary | None
    ) -> list[_Captured]:
        torch.cuda.synchronize(x.device)
        gc.collect()  # not while a graph is captured, where freeing what CUDA holds would end the capture
        stream, pool = torch.cuda.Stream(x.device), torch.cuda.graph_pool_handle()
        forwards, captured = [], []
        with torch.cuda.stream(stream), _autocast_without_cache():
            x = x.detach().clone().requires_grad_(x.requires_grad)
            for block, forward, parameters in zip(self._blocks, self._forwards, trained, strict=True):
                scale = None if branch_scale is None else branch_scale.clone()
                turned = None if rotary is None else (rotary[0].clone(), rotary[1].clone())
                inputs, weights = _tensors(x, scale, turned), _leaves(block)
                run = partial(functional_call, _Own(block, forward), weights, (x, scale, turned))
                for _ in range(_WARM_UP):
                    _gradients(run(), [*inputs, *weights.values()])
                torch.cuda.synchronize(x.device)
                graph = torch.cuda.CUDAGraph()
                with _capturing(graph, pool):
                    output = run()
                forwards.append((inputs, weights, parameters, graph, output))
                x = output.detach().requires_grad_()
            gradient = torch.zeros_like(x)
            for inputs, weights, parameters, graph, output in reversed(forwards):
                backward = torch.cuda.CUDAGraph()
                with _capturing(backward, pool):
                    gradients = _gradients(output, [*inputs, *weights.values()], gradient)
                captured.append(_Captured(inputs, parameters, graph, output.detach(), gradient, backward, gradients))
                gradient = gradient if gradients[0] is None else gradients[0]
        torch.cuda.current_stream(x.device).wait_stream(stream)
        return captured[::-1]


class _Replay(torch.autograd.Function):
    """A block by its graphs. What it gives lies in memory that the next step's replay writes again."""

    @staticmethod
    def forward(ctx: Any, captured: _Captured, accumulates: bool, *tensors: Tensor) -> Tensor:
        ctx.captured, ctx.accumulates = captured, accumulates
        for own, given in zip(captured.inputs, tensors[: len(captured.inputs)], strict=True):
            if own.data_ptr() != given.data_ptr():
                own.copy_(given)
        captured.under_way = True
        captured.forward.replay()
        return captured.output.detach()

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> Any:
        captured: _Captured = ctx.captured
        if captured.output_gradient.data_ptr() != output_gradients[0].data_ptr():
            captured.output_gradient.copy_(output_gradients[0])
        captured.backward.replay()
        captured.under_way = False
        # What is summed over micro-batches would else be overwritten by the next one's.
        copied = torch.Tensor.clone if ctx.accumulates else torch.Tensor.detach
        return None, None, *(None if each is None else copied(each) for each in captured.gradients)


def _tensors(x: Tensor, branch_scale: Tensor | None, rotary: Rotary | None) -> list[Tensor]:
    return [x, *([] if branch_scale is None else [branch_scale]), *(rotary or ())]


class _Own(nn.Module):
    """A block's own forward, as a module whose parameters can be put in the place of the block's."""

    def __init__(self, block: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.run = block, run

    def forward(self, *inputs: Any) -> Tensor:
        return self.run(*inputs)


def _leaves(block: nn.Module) -> dict[str, Tensor]:
    """The memory of the trained parameters as tensors that autograd has not seen, by their names in _Own.

    DDP and ZeRO keep what autograd has of the parameters themselves, on the stream on which they began, and a capture
    on another one would have to wait for that.
    """
    return {f"block.{name}": p.detach().requires_grad_() for name, p in block.named_parameters() if p.requires_grad}


def _gradients(output: Tensor, tensors: Sequence[Tensor], gradient: Tensor | None = None) -> list[Tensor | None]:
    """Those of the tensors that have one, at their places; autocast is for forwards alone."""
    wanted = [each for each in tensors if each.requires_grad]
    with torch.autocast("cuda", enabled=False):
        gradient = torch.ones_like(output) if gradient is None else gradient
        found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
    return [next(found) if each.requires_grad else None for each in tensors]


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Not by torch.cuda.graph, which collects garbage and empties the cache each time."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads go on: NCCL's, the data feed's
    try:
        yield
    finally:
        graph.capture_end()


@contextmanager
def _autocast_without_cache() -> Iterator[None]:
    """Else weights that are cast while a graph is captured would be used outside of it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
