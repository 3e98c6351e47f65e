"""Bits that one rank has otherwise than the others, over real gloo ranks."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.engine.test_ranks import in_world
from vitscale.engine.digest import compare
from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import CorruptionError

TIMEOUT = timedelta(seconds=60)


def _flip(rank: int, world_size: int, port: int, backend: str, answers: Any) -> None:
    """A model of several types, then a bit of the last rank flipped in one of its tensors, and flipped back."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(backend, timeout=TIMEOUT)
    ranks = ProcessRanks(TIMEOUT)
    chance = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(3, 50, generator=chance))
    tensors = {
        "weights": weights,
        "moments": torch.randn(50, 3, generator=chance).T,  # not contiguous
        "lower": torch.randn(7, generator=chance).bfloat16(),
        "steps": torch.tensor(3),
        "mask": torch.tensor([True, False]),
    }
    compare(1, tensors.items(), ranks)
    errors = []
    for bit in (0, 31):
        if rank == world_size - 1:
            weights.data.view(torch.int32)[2, 17] ^= torch.tensor(1 << bit).int()
        try:
            compare(2, tensors.items(), ranks)
        except CorruptionError as error:
            errors.append(str(error))
        if rank == world_size - 1:
            weights.data.view(torch.int32)[2, 17] ^= torch.tensor(1 << bit).int()
    compare(3, tensors.items(), ranks)
    answers.put((rank, errors))
    ranks.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_flipped_bit_is_named(world_size: int) -> None:
    host = socket.gethostname()
    for _, errors in in_world(world_size, "gloo", _flip):
        assert len(errors) == 2
        for error in errors:
            assert "in 1 of 5 tensors that all ranks have (weights)" in error
            if world_size == 3:
                assert error.startswith(f"step 2: rank 2 on {host}: not the same bits as the other ranks")
            else:
                assert error.startswith(f"step 2: rank 0 on {host}, rank 1 on {host}: not the same bits as each other")
