"""Stages 1 to 3: DeepSpeed's ZeRO."""

from __future__ import annotations

from typing import Any

import torch

from vitscale import heartbeat
from vitscale.engine import zero_state
from vitscale.engine.engine import Engine, Inputs
from vitscale.engine.zero_host import spare_the_host


class ZeroEngine(Engine):
    """Stages 1 to 3: DeepSpeed's engine; bf16 weights over fp32 masters."""

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        bf16 = self.config.train.precision == "bf16"
        # DeepSpeed makes its masters from the module's bf16 copies, which would round the weights.
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        exact = {name: p.detach().clone() for name, p in trained.items()} if bf16 else {}
        self.engine, wrapped = self.accelerator.prepare(self.module, optimizer)
        self.model, self.optimizer = self.engine, wrapped.optimizer
        spare_the_host(self.optimizer, self.stage, self.device)
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
