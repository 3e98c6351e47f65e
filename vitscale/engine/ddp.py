"""Stage 0: accelerate's DDP."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from vitscale import heartbeat
from vitscale.engine.engine import Engine, Inputs


def _mean_in_bf16(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's mean of a bucket over the ranks. As torch's bf16_compress_hook, which is for NCCL alone and divides what is
    rounded already."""
    gradients = bucket.buffer()
    sent = (gradients / dist.get_world_size()).bfloat16()

    def received(work: torch.futures.Future[Any]) -> torch.Tensor:
        return gradients.copy_(work.value()[0])

    work = dist.all_reduce(sent, async_op=True)
    assert work is not None
    return work.get_future().then(received)


class DDPEngine(Engine):
    """Stage 0: every rank holds everything; bf16 is autocast over fp32 weights."""

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.model = self.accelerator.prepare(self.module)
        if self.ranks.world_size > 1 and self.config.parallel.reduce_dtype == "bf16":
            # A lambda: torch looks at annotations, which here are texts.
            self.model.register_comm_hook(None, lambda state, bucket: _mean_in_bf16(bucket))  # type: ignore[operator]

    def _forward_backward(self, inputs: Inputs, last: bool) -> Any:
        with self._reduced_at(last):
            output = self.model(**inputs)
            heartbeat.advance()  # from here on the others may be waited for
            (output.loss / self.accumulation).backward()
        return output

    def _reduced_at(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def warm_up(self, inputs: Inputs) -> None:
        # DDP rebuilds its buckets after the first backward, and with other buckets gradients differ
        # in their last bits; a resumed run must not have a first iteration of its own.
        if self.ranks.world_size > 1:
            self.model(**inputs).loss.backward()
            self.optimizer.zero_grad()

    def _update(self) -> tuple[torch.Tensor, bool]:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        applied = bool(torch.isfinite(norm))
        if applied:
            if self.config.optimizer.clip > 0:
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.clip, norm)
            self.optimizer.step()
        # Zeros in DDP's buckets, where there are more micro-batches: without one the gradients of those that are not
        # reduced would lie beside the buckets.
        self.optimizer.zero_grad(set_to_none=self.accumulation == 1)
        return norm, applied
