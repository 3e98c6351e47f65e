"""What DeepSpeed's ZeRO optimizers do on the host, with fewer and larger operations and without waiting for the GPU.

At stages 1 and 2 DeepSpeed (0.19.8) takes the gradients one at a time: two copies and a dozen views for each, then five
kernels to look for what is not finite and three for the norm, while most GPUs have nothing to do ("ZeRO" in
docs/measurements.md). Here the same copies are made for a bucket at once, in the same order, and one norm does for
both; the host waits for that one alone. What is trained is the same, to the bit but for the norm's last one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def spare_the_host(optimizer: Any, stage: int, device: torch.device) -> None:
    """Change how this DeepSpeed optimizer works; one that is offloaded steps in ways of its own."""
    if stage == 3:
        _know_hooks(optimizer.module)
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        return
    _norm_at_once(optimizer, stage)
    if stage < 3:
        _clip_unasked(optimizer)
        _Buckets(optimizer)
    if device.type == "cuda" and stage == 3:
        optimizer.reduce_and_partition_stream = _OrderedStream(device)


def know_signature(function: type[torch.autograd.Function]) -> None:
    """Keep the signature of a function's forward, which torch asks for at each call and Python would make anew."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)


def _know_hooks(module: nn.Module) -> None:
    """Of the two functions around each part of the model by which stage 3 fetches and releases weights."""
    for part in module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if name in vars(part):
                know_signature(vars(part)[name])


def _norm_at_once(optimizer: Any, stage: int) -> None:
    """One norm of all gradients of a group, which also tells whether all are finite.

    DeepSpeed lets the host wait for the GPU in each group's, though its step asks whether the whole one is finite.
    """
    dtype = torch.float32 if stage < 3 else torch.float64  # as DeepSpeed sums it over ranks

    def grad_norm(gradients: Iterable[Tensor], params: Sequence[Tensor], norm_type: float = 2) -> Tensor:
        norms = torch._foreach_norm(list(gradients), norm_type, torch.float64)
        total = torch.stack(norms).pow(norm_type).sum() if norms else torch.zeros((), device=optimizer.device)
        total = total.to(dtype)
        if dist.get_world_size(optimizer.dp_process_group) > 1:
            dist.all_reduce(total, group=optimizer.dp_process_group)
        return total.pow(1 / norm_type)

    optimizer.get_grad_norm_direct = grad_norm
    optimizer.has_overflow = lambda partition_gradients=True: False  # a norm that is not finite skips the step too


def _clip_unasked(optimizer: Any) -> None:
    """Clip without asking for each group whether the norm is finite: its step has asked."""

    def clip(gradients: Sequence[Tensor], norm: Tensor) -> None:
        if optimizer.clip_grad > 0:
            scale = 1 / ((norm + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
            for gradient in gradients:
                gradient.mul_(scale)

    optimizer.unscale_and_clip_grads = clip


class _Buckets:
    """Takes the place of what DeepSpeed's optimizer does for each parameter in a backward.

    It is put off until the bucket of gradients is full, or until the backward ends.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._waiting: list[tuple[Any, int]] = []  # parameters and their groups, of the next bucket
        self._elements = 0
        self._kept: list[tuple[Any, ...]] = []  # of a reduced bucket: what _keep was called with
        self._add_one = optimizer.reduce_independent_p_g_buckets_and_remove_grads
        self._keep_one = optimizer.copy_grads_in_partition
        # Not there before 0.19.8, nor was the group that is asked for.
        self._is_kept_apart = getattr(optimizer, "_use_compact_grad_partition_buffer", lambda *_: False)
        self._end_backward = optimizer.independent_gradient_partition_epilogue
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = self._add
        optimizer.copy_grads_in_partition = self._keep
        optimizer.independent_gradient_partition_epilogue = self._end

    def _add(self, param: Tensor, group: int) -> None:
        """The gradient of a parameter is there."""
        count, most = param.numel(), self._optimizer.reduce_bucket_size
        if self._elements + count > most:
            self._fill_bucket()
        if count > most:  # is reduced where it lies
            self._add_one(param, group)
            self._reduce_bucket()
        else:
            self._waiting.append((param, group))
            self._elements += count

    def _fill_bucket(self) -> None:
        if not self._waiting:
            return
        optimizer = self._optimizer
        bucket = optimizer.ipg_buckets[optimizer.communication_data_type]
        gradients = [optimizer.get_gradient_for_reduction(param) for param, _ in self._waiting]
        _move(gradients, bucket.buffer[bucket.index][: self._elements])
        bucket.elements = self._elements
        bucket.grads.extend(gradients)
        bucket.params.extend(
            (group, param.param_idx_in_group, optimizer.get_param_id(param)) for param, group in self._waiting
        )
        if optimizer.overlap_comm:
            bucket.copy_streams.add(torch.cuda.current_stream())
        self._waiting, self._elements = [], 0
        self._reduce_bucket()

    def _reduce_bucket(self) -> None:
        optimizer = self._optimizer
        bucket = optimizer.ipg_buckets[optimizer.communication_data_type]
        optimizer.reduce_ipg_grads(comm_dtype=optimizer.communication_data_type)
        kept, self._kept = self._kept, []
        if kept:
            with torch.cuda.stream(optimizer.reduction_stream) if optimizer.overlap_comm else nullcontext():
                self._keep_all(kept)
        if optimizer.overlap_comm:
            bucket.index = 1 - bucket.index

    def _keep(self, param: Tensor, *group: int) -> None:
        """The gradient of a parameter is reduced, and lies where the next bucket will."""
        if self._is_kept_apart(*group):
            self._keep_one(param, *group)
        else:
            self._kept.append((param, *group))

    def _keep_all(self, kept: Sequence[tuple[Any, ...]]) -> None:
        optimizer = self._optimizer
        self._keep_one(*kept[0])  # makes the memory for all
        gradients = [optimizer.get_gradient_for_reduction(param) for param, *_ in kept[1:]]
        start = optimizer.grads_in_partition_offset
        optimizer.grads_in_partition_offset += sum(each.numel() for each in gradients)
        _move(gradients, optimizer.grads_in_partition[start : optimizer.grads_in_partition_offset])

    def _end(self) -> None:
        """Reduce the last bucket; DeepSpeed's host would wait for the whole GPU then."""
        optimizer = self._optimizer
        self._fill_bucket()
        overlaps = optimizer.overlap_comm
        if overlaps:
            torch.cuda.current_stream().wait_stream(optimizer.reduction_stream)
            optimizer.overlap_comm = False
        try:
            self._end_backward()
        finally:
            optimizer.overlap_comm = overlaps


class _OrderedStream(torch.cuda.Stream):
    """A stream that the current stream waits for where DeepSpeed lets the host wait."""

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self)


def _move(tensors: Sequence[Tensor], target: Tensor) -> None:
    """Copy tensors into a flat one, one behind the other, and let them be views of it."""
    if tensors:
        parts = target.split([each.numel() for each in tensors])
        torch._foreach_copy_(list(parts), [each.view(-1) for each in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.data = part.view_as(tensor)
