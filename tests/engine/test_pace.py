"""Which rank is slow: its own forwards tell, whatever the others wait for."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.engine.test_ranks import in_world
from vitscale.engine.pace import Pace, SlowRanks
from vitscale.engine.ranks import ProcessRanks

CPU = torch.device("cpu")
SLOW_RANK = 2


class Waits(nn.Module):
    """A model whose forward takes so long."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def forward(self) -> None:
        time.sleep(self.seconds)


def test_the_median_of_the_forwards_in_training_since_the_last_look() -> None:
    model = Waits()
    pace = Pace(model, CPU)
    assert pace.read() == 0.0
    for model.seconds in (0.02, 0.02, 0.2):
        model()
    model.eval()
    for model.seconds in (0.2, 0.2, 0.2):
        model()
    assert 0.02 <= pace.read() < 0.2
    assert pace.read() == 0.0


def _train(rank: int, world_size: int, port: int, backend: str, answers: Any) -> None:
    """Five rows in which one rank is slow but for the first, then three in which none is."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    timeout = timedelta(seconds=60)
    dist.init_process_group(backend, timeout=timeout)
    model, lines = Waits(), list[str]()
    ranks = ProcessRanks(timeout)
    slow = SlowRanks(Pace(model, CPU), ranks, lines.append)
    rows = []
    for row in range(8):
        model.seconds = 0.3 if rank == SLOW_RANK and 1 <= row < 5 else 0.02
        model()
        ranks.barrier()  # as a backward is: here all wait for the slow one
        rows.append(slow.columns(0.1 * rank))
    answers.put((rank, rows, lines))
    ranks.barrier()
    dist.destroy_process_group()


def test_a_slow_rank_is_in_every_row_and_named_once() -> None:
    answers = in_world(3, "gloo", _train)
    for _, rows, lines in answers:
        assert rows == answers[0][1], "the same on all ranks"
        assert [row["slowest_rank"] for row in rows[1:5]] == [SLOW_RANK] * 4
        for row in rows[1:5]:
            assert row["slowest_forward_seconds"] >= 0.3 > row["forward_seconds"] >= 0.02
            assert row["data_share"] == 0.2, "of the rank that waits longest"
        assert rows[6]["slowest_forward_seconds"] < 0.3
        assert len([line for line in lines if f"rank {SLOW_RANK} on" in line]) == 1
