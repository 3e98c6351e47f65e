"""How long ranks take to become a process group: torch.distributed over gloo alone, all of them on this machine.

`python -m vitscale.bench.joins RANKS` forks the ranks from one process, which has imported torch, and prints JSON: the
seconds that the slowest rank took to join and for the first exchanges after it, and how many files rank 0 has open.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vitscale.world import RESOLVER, child_environment, open_files_limit

_TIMEOUT = timedelta(seconds=300)


def measure(ranks: int, on_demand: bool) -> dict[str, float]:
    """`joining`, `first_exchange` in seconds and `open_files`; on_demand: whether gloo connects two when they talk."""
    ways = {"TORCH_GLOO_LAZY_INIT": str(int(on_demand)), "OMP_NUM_THREADS": "1", "RES_OPTIONS": RESOLVER}
    environment = child_environment() | ways
    command = [sys.executable, "-m", "vitscale.bench.joins", str(ranks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _be_rank(rank: int, ranks: int, port: int, answers: Any) -> None:
    began = time.monotonic()
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0, _TIMEOUT, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_TIMEOUT)
    joined = time.monotonic()
    dist.barrier()
    values: list[Any] = [None] * ranks
    dist.all_gather_object(values, rank)
    answers.put((rank, joined - began, time.monotonic() - joined, len(list(Path("/proc/self/fd").iterdir()))))
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: list[str]) -> int:
    """Be the ranks and print what they took."""
    ranks = int(arguments[0])
    open_files_limit(raised=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_be_rank, args=(rank, ranks, port, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    of_ranks = sorted(answers.get(timeout=_TIMEOUT.total_seconds()) for _ in processes)
    for process in processes:
        process.join()
    _, joining, exchange, files = zip(*of_ranks, strict=True)
    print(json.dumps({"joining": max(joining), "first_exchange": max(exchange), "open_files": files[0]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
