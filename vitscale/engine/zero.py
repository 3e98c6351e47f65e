"""Stages 1 to 3: DeepSpeed's ZeRO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vitscale import heartbeat
from vitscale.engine import zero_state
from vitscale.engine.engine import Engine, Inputs


class ZeroEngine(Engine):
    """Stages 1 to 3: DeepSpeed's engine; bf16 weights over fp32 masters."""

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        bf16 = self.config.train.precision == "bf16"
        # DeepSpeed makes its masters from the module's bf16 copies, which would round the weights.
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        exact = {name: p.detach().clone() for name, p in trained.items()} if bf16 else {}
        self.engine, wrapped = self.accelerator.prepare(self.module, optimizer)
        self.model, self.optimizer = self.engine, wrapped.optimizer
        _spare_the_host(self.optimizer, self.stage, self.device)
        if exact:
            for fragment in zero_state.fragments(self.module, self.optimizer, self.stage, self.ranks.rank):
                values = exact[fragment.name].view(-1)[fragment.start : fragment.start + fragment.count]
                fragment.weights().copy_(values)

    def _forward_backward(self, inputs: Inputs, last: bool) -> Any:
        # Pixels stay fp32: the model casts them where they meet its weights, and its targets stay exact.
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        output = self.engine(**inputs)
        heartbeat.advance()  # from here on the others may be waited for, at stage 3 before it too
        self.engine.backward(output.loss)  # divides by the accumulation steps of its config
        return output

    def _update(self) -> tuple[torch.Tensor, bool]:
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm()), self.engine.was_step_applied()


def _spare_the_host(optimizer: Any, stage: int, device: torch.device) -> None:
    """Let DeepSpeed's optimizer start fewer kernels and not wait for the GPU after a backward.

    In its 0.19.8 the norm takes three kernels a parameter and the search for non-finite gradients five more, which the
    norm finds too; and its epilogue of a backward keeps the host from all that it could prepare meanwhile: see
    "Step" in docs/measurements.md. An optimizer that is offloaded has other ways, and they stay.
    """
    if optimizer.__dict__.get("cpu_offload") or optimizer.__dict__.get("offload_optimizer"):
        return
    norm_direct = optimizer.get_grad_norm_direct

    def grad_norm(gradients: Iterable[torch.Tensor], params: Sequence[torch.Tensor], norm_type: float = 2) -> Any:
        present = list(gradients)
        norms = torch._foreach_norm(present, norm_type, torch.float64) if present else []
        return norm_direct([torch.stack(list(norms))] if norms else [], params, norm_type)

    optimizer.get_grad_norm_direct = grad_norm
    optimizer.has_overflow = lambda partition_gradients=True: False  # a norm that is not finite skips the step too
    if device.type != "cuda":
        return
    if stage == 3:
        optimizer.reduce_and_partition_stream = _OrderedStream(device)
        return
    epilogue = optimizer.independent_gradient_partition_epilogue

    def ordered_epilogue() -> None:
        optimizer.reduce_ipg_grads()
        torch.cuda.current_stream(device).wait_stream(optimizer.reduction_stream)
        optimizer.overlap_comm = False  # nothing is left to reduce, and with it the host would wait for the GPU
        try:
            epilogue()
        finally:
            optimizer.overlap_comm = True

    optimizer.independent_gradient_partition_epilogue = ordered_epilogue


class _OrderedStream(torch.cuda.Stream):
    """A stream that the current stream waits for, and not the host."""

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self)
