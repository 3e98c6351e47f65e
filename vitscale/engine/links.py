"""How fast the ranks reach each other: all-reduces over the world, and between neighbouring nodes."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vitscale.engine.ranks import ProcessRanks
from vitscale.world import World, host

LARGE_BYTES = 64 << 20
START_BYTES = 16 << 20  # at each start
_REPEATS = 3  # of which the fastest counts


@dataclass(frozen=True)
class Links:
    """Seconds of all-reduces."""

    small: float  # one number over all ranks
    large: float  # LARGE_BYTES over all ranks
    between: tuple[tuple[str, str, float], ...]  # (host, next host, LARGE_BYTES between one rank of each)


def first_all_reduce(device: torch.device) -> float:
    """Seconds of an all-reduce of START_BYTES as gradients go, after one that connects the ranks. A collective."""
    return _seconds(torch.zeros(START_BYTES // 4, device=device), None, repeats=1)


def measure_links(ranks: ProcessRanks, world: World) -> Links:
    """As gradients go: over NCCL between GPUs, else over gloo. A collective.

    Nodes are measured in pairs of neighbours by rank, every second pair at once, so that a slow one is in slow pairs.
    """
    backend, device = "gloo", torch.device("cpu")
    if world.device == "cuda":
        backend, device = "nccl", torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    everyone = dist.new_group(backend=backend)
    one, many = torch.zeros(1, device=device), torch.zeros(LARGE_BYTES // 4, device=device)
    small, large = _seconds(one, everyone), _seconds(many, everyone)
    firsts = [(rank, name) for rank, (place, name) in enumerate(ranks.gather((world.local_rank, host()))) if place == 0]
    between: list[tuple[str, str, float]] = []
    for even in (0, 1):
        for (rank, name), (next_rank, next_name) in list(itertools.pairwise(firsts))[even::2]:
            if world.rank in (rank, next_rank):
                pair = dist.new_group([rank, next_rank], backend=backend, use_local_synchronization=True)
                seconds = _seconds(many, pair)
                if world.rank == rank:
                    between.append((name, next_name, seconds))
        ranks.barrier()  # the other pairs are not to share their links with these
    return Links(small, large, tuple(link for links in ranks.gather(between) for link in links))


def _seconds(tensor: torch.Tensor, group: Any, repeats: int = _REPEATS) -> float:
    """Of the fastest of some all-reduces, after one that connects."""
    taken = []
    for _ in range(repeats + 1):
        began = time.monotonic()
        dist.all_reduce(tensor, group=group)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        taken.append(time.monotonic() - began)
    return min(taken[1:])
