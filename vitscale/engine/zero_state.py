"""Where each ZeRO stage keeps the fp32 pieces of every parameter and of Adam's moments, and how weights follow them.

DeepSpeed has no public way to these, so this file knows its attributes (0.19.x: runtime/zero/
stage_1_and_2.py and stage3.py); the rest of vitscale asks for fragments and has weights spread. A change of
DeepSpeed's attributes ends in an AttributeError, not in a wrong checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements that this rank owns: views into what the optimizer steps."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # of this run in the flattened parameter
    flat: torch.Tensor  # the tensor that the optimizer steps and keeps state for
    offset: int  # of this run in `flat`
    count: int

    def weights(self) -> torch.Tensor:
        """fp32 master weights, 1-D view [count]."""
        return self.within(self.flat.detach())

    def moment(self, optimizer: torch.optim.Optimizer, kind: str) -> torch.Tensor:
        """Adam's `kind` (exp_avg or exp_avg_sq), 1-D view [count]."""
        return self.within(optimizer.state[self.flat][kind])

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """These elements of a tensor laid out as `flat`, 1-D view [count]."""
        return tensor.view(-1)[self.offset : self.offset + self.count]

    def cut(self, first: int, count: int) -> Fragment:
        """Elements [first, first + count) of this run."""
        return replace(self, start=self.start + first, offset=self.offset + first, count=count)


def share(fragments: Sequence[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """One rank's part of fragments that all ranks have; parts differ by at most one element."""
    total, position, part = sum(fragment.count for fragment in fragments), 0, []
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    for fragment in fragments:
        start, end = max(first - position, 0), min(last - position, fragment.count)
        if start < end:
            part.append(fragment.cut(start, end - start))
        position += fragment.count
    return part


def frozen_share(module: nn.Module, stage: int, rank: int, world_size: int) -> list[Fragment]:
    """This rank's part (see `share`) of the frozen parameters. To be called before the engine is made.

    ZeRO keeps only low-precision copies of them, so their fp32 values are copied here; at stage 0 they
    stay the module's own.
    """
    part = share(list(_whole(module, trained=False)), rank, world_size)
    return part if stage == 0 else [replace(run, flat=run.weights().clone(), offset=0) for run in part]


def fragments(module: nn.Module, optimizer: Any, stage: int, rank: int) -> list[Fragment]:
    """The fragments of trained parameters that this rank owns.

    `module`: the plain module; `optimizer`: torch's at stage 0, DeepSpeed's ZeRO optimizer above.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if stage == 0:
        return list(_whole(module, trained=True))
    if stage in (1, 2):
        return list(_stage_1_and_2(optimizer, names))
    return list(_stage_3(optimizer, names, rank))


def inner_optimizer(optimizer: Any, stage: int) -> torch.optim.Optimizer:
    """The torch optimizer that holds the state."""
    return optimizer if stage == 0 else optimizer.optimizer


def flats(optimizer: Any, stage: int) -> list[torch.Tensor]:
    """The tensors that the torch optimizer steps on this rank."""
    if stage == 0:
        return [p for group in optimizer.param_groups for p in group["params"]]
    if stage in (1, 2):
        return list(optimizer.single_partition_of_fp32_groups)
    return list(optimizer.fp32_partitioned_groups_flat)


def spread_weights(optimizer: Any, stage: int) -> None:
    """Copy the master weights into those that forwards use, on all ranks, as a step does. A collective."""
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        # Weights below the persistence threshold are whole on every rank: they are gathered anew.
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


def _whole(module: nn.Module, trained: bool) -> Iterator[Fragment]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad == trained:
            yield Fragment(name, tuple(parameter.shape), 0, parameter, 0, parameter.numel())


def _stage_1_and_2(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank owns all of it
                continue
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            name, shape = names[id(parameter)], tuple(parameter.shape)
            yield Fragment(name, shape, here.start, flat, there.start, here.numel)


def _stage_3(optimizer: Any, names: dict[int, str], rank: int) -> Iterator[Fragment]:
    for group in optimizer.fp16_groups:
        for parameter in group:
            index, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * share
            count = min(share, parameter.ds_numel - start)  # the last rank's tail is padding
            if count > 0:
                flat = optimizer.fp32_partitioned_groups_flat[index]
                yield Fragment(names[id(parameter)], tuple(parameter.ds_shape), start, flat, int(offset), count)
