"""What the ranks tell each other outside of gradients: small values, over gloo on the CPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


class ProcessRanks:
    """The ranks of the default process group; one rank needs no group.

    `gather`, `collect`, `sum` and `barrier` are collectives: every rank calls them, in the same order.
    """

    def __init__(self, timeout: timedelta) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self._group: Any = None
        if self.world_size > 1:
            # NCCL would need the values on the GPU, and would queue behind its kernels.
            same = dist.get_backend() == "gloo"
            self._group = dist.group.WORLD if same else dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on rank 0; nothing on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(value, values if self.rank == 0 else None, dst=0, group=self._group)
        return values

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over the ranks of a float64 vector, added in the order of the ranks on each of them."""
        if self.world_size == 1:
            return values
        mine = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        every = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(every, mine, group=self._group)
        total = np.zeros(len(mine))
        for theirs in every:
            total += theirs.numpy()
        return total

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self._group)
