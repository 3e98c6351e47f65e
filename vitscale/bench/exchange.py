"""`vitscale bench exchange`: what the ranks' exchange of a step costs the host, by torch.distributed alone.

A step is a pause of --step-ms, as a GPU leaves the host waiting; the figure is the time that calls of the exchange take
on the slowest rank, which is what a step becomes longer by. Processes share this machine's cores, so with more of
them than cores the system's turns are in the figures too.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from vitscale.bench.rounds import benchmark_parser, figures, in_turns, report
from vitscale.engine.ranks import PendingSum, ProcessRanks
from vitscale.inference.command import above_zero

GATHERED, WAITED, BESIDE = (
    "gathered in a ring, added in order",
    "one all-reduce, waited for",
    "one beside the next step",
)
# As the loop has them: loss, stop, retries, and the causes of bad samples.
_VALUES = {f"value {number}": float(number) for number in range(12)}
_TIMEOUT = timedelta(minutes=5)


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = benchmark_parser("exchange", __doc__, rounds=3)
    text = "processes, one measurement each (default: %(default)s)"
    parser.add_argument("--ranks", type=above_zero, nargs="+", default=[2, 4, 16, 64], metavar="N", help=text)
    parser.add_argument("--steps", type=above_zero, default=50, help="of a turn (default: %(default)s)")
    parser.add_argument("--step-ms", type=above_zero, default=50, help="a step's pause (default: %(default)s)")
    options = parser.parse_args(arguments)
    contenders: dict[str, Any] = {}
    for world_size in options.ranks:
        seconds = _in_world(world_size, options.rounds, options.steps, options.step_ms / 1000)
        contenders |= {f"{world_size} ranks: {name}": f for name, f in figures(seconds, GATHERED).items()}
    result = {"bench": "exchange", **vars(options), "values": len(_VALUES), "contenders": contenders}
    report("What the exchange adds to a step", {"microseconds": "{microseconds:,.0f}"}, result | {
        "contenders": {name: f | {"microseconds": f["median_ms"] * 1000} for name, f in contenders.items()}
    })  # fmt: skip
    return 0


def _in_world(world_size: int, rounds: int, steps: int, pause: float) -> dict[str, list[float]]:
    """Seconds a step by contender, a turn each; forked ranks on this machine."""
    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    arguments = (world_size, port, rounds, steps, pause, answers)
    processes = [context.Process(target=_be_rank, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"ranks ended with {[process.exitcode for process in processes]}")
    return answers.get()


def _be_rank(rank: int, world_size: int, port: int, rounds: int, steps: int, pause: float, answers: Any) -> None:
    os.dup2(2, 1)  # gloo tells of its connections, and the parent's last line is JSON
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    ranks = ProcessRanks(_TIMEOUT)
    pending: list[PendingSum] = []

    def beside() -> None:
        if pending:
            pending.pop().finish()
        pending.append(ranks.start_sum(_VALUES))

    contenders: dict[str, Callable[[], object]] = {
        GATHERED: lambda: ranks.sum(_VALUES),
        WAITED: lambda: ranks.start_sum(_VALUES).finish(),
        BESIDE: beside,
    }

    def turn(exchange: Callable[[], object]) -> float:
        spent = 0.0
        ranks.barrier()
        for _ in range(steps):
            time.sleep(pause)
            began = time.perf_counter()
            exchange()
            spent += time.perf_counter() - began
        while pending:
            pending.pop().finish()
        return max(ranks.gather(spent / steps))

    seconds = in_turns({name: partial(turn, each) for name, each in contenders.items()}, rounds)
    if rank == 0:
        answers.put(seconds)
    ranks.barrier()
    dist.destroy_process_group()
