"""Exchanges of small values between ranks, over gloo on the CPU; gradients go another way."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


class ProcessRanks:
    """The ranks of the default process group; one rank needs no group.

    Its methods are collectives: every rank calls them, in the same order.
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

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums by name over the ranks, added in the order of the ranks, so that every rank has the same bits.

        Every rank gives the same names.
        """
        if self.world_size == 1:
            return dict(values)
        names = sorted(values)
        local = torch.tensor([values[name] for name in names], dtype=torch.float64)
        of_ranks = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(of_ranks, local, group=self._group)
        totals = torch.zeros_like(local)
        for of_rank in of_ranks:
            totals += of_rank
        return dict(zip(names, totals.tolist(), strict=True))

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank; the others give None."""
        assert (data is not None) == (self.rank == 0), "rank 0 alone has what is broadcast"
        if self.world_size == 1:
            assert data is not None
            return data
        size = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(size, src=0, group=self._group)
        content = torch.empty(int(size), dtype=torch.uint8)
        if data is not None:
            content.copy_(torch.tensor(np.frombuffer(data, dtype=np.uint8)))
        dist.broadcast(content, src=0, group=self._group)
        return content.numpy().tobytes()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self._group)
