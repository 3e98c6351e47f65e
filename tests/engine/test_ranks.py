"""What ranks exchange, over the world's own gloo group and over a second one beside another backend."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from vitscale.engine.ranks import ProcessRanks, _meet, join, meeting
from vitscale.errors import LaunchError
from vitscale.world import World, host

TIMEOUT = timedelta(seconds=60)
# torch's name of gloo where it is one of several backends: not the name "gloo", so a group of its own is made,
# as beside NCCL.
MIXED = "cpu:gloo"


def _exchange(ranks: ProcessRanks) -> dict[str, Any]:
    rank, last = ranks.rank, ranks.world_size - 1
    ranks.barrier()
    values = {"loss": 0.1 * (rank + 1), "stop": rank == last, "a": float(rank)}
    pending = ranks.start_sum(values)
    return {
        "gathered": ranks.gather({"rank": rank}),
        "collected": ranks.collect([rank] * rank),
        "sums": ranks.sum(dict(sorted(values.items(), reverse=rank % 2 == 1))),  # the names in any order
        "pending": pending.finish(),
        "bytes": ranks.broadcast(b"index of rank 0" if rank == 0 else None),
        "nothing": ranks.broadcast(b"" if rank == 0 else None),
    }


def _be_rank(rank: int, world_size: int, port: int, backend: str, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as `world.enter` has it
    dist.init_process_group(backend, timeout=TIMEOUT)
    ranks = ProcessRanks(TIMEOUT)
    has_own_group = ranks._group is not dist.group.WORLD
    answers.put((rank, has_own_group, _exchange(ranks)))
    ranks.barrier()
    dist.destroy_process_group()


def in_world(world_size: int, backend: str, work: Callable[..., None]) -> list[Any]:
    """What `work(rank, world_size, port, backend, answers)` puts into `answers` on forked ranks, by rank, first."""
    return _started([(rank, world_size) for rank in range(world_size)], backend, work)


def _started(numbers: list[tuple[int, int]], backend: str, work: Callable[..., None]) -> list[Any]:
    """What processes of these (rank, world size) answer, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, world_size, port, backend, answers)) for rank, world_size in numbers
    ]
    for process in processes:
        process.start()
    received = sorted((answers.get(timeout=60) for _ in processes), key=lambda answer: answer[0])
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return received


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("backend", ["gloo", MIXED])
def test_exchanges_of_a_world(world_size: int, backend: str) -> None:
    answers = in_world(world_size, backend, _be_rank)
    assert [has_own_group for _, has_own_group, _ in answers] == [backend == MIXED] * world_size
    loss = 0.0
    for rank in range(world_size):  # in the order of the ranks, to the last bit
        loss += 0.1 * (rank + 1)
    for rank, _, answer in answers:
        assert answer["pending"] == answers[0][2]["pending"] == pytest.approx(answer["sums"], rel=1e-12)
        assert answer["gathered"] == [{"rank": other} for other in range(world_size)]
        assert answer["collected"] == ([[other] * other for other in range(world_size)] if rank == 0 else [])
        assert answer["sums"] == {"loss": loss, "stop": 1.0, "a": sum(range(world_size))}
        assert (answer["bytes"], answer["nothing"]) == (b"index of rank 0", b"")


def test_one_rank_needs_no_group() -> None:
    assert not dist.is_initialized()
    answer = _exchange(ProcessRanks(TIMEOUT))
    assert answer == {
        "gathered": [{"rank": 0}],
        "collected": [[]],
        "sums": {"loss": 0.1, "stop": True, "a": 0.0},
        "pending": {"loss": 0.1, "stop": True, "a": 0.0},
        "bytes": b"index of rank 0",
        "nothing": b"",
    }


def _try_to_join(rank: int, world_size: int, port: int, backend: str, told: Any) -> None:
    """As a launcher would start it that has come to these numbers."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **dict.fromkeys(["RANK", "WORLD_SIZE"], "9"))
    try:
        join(World(rank, world_size), backend, 20)
        told.put((rank, "joined"))
    except LaunchError as error:
        told.put((rank, str(error)))
    told.close()
    told.join_thread()
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)


@pytest.mark.parametrize(("numbers", "wrong"), [
    ([(0, 3), (1, 3), (1, 3)], r"RANK=1 WORLD_SIZE=3 on \S+: another process has come with this RANK \(\S+ process \d"),
    ([(0, 2), (1, 3)], r"WORLD_SIZE=[23] on \S+: another process has come with WORLD_SIZE=[23]: all need the same"),
])  # fmt: skip
def test_ranks_that_are_no_world_are_told_at_once(numbers: list[tuple[int, int]], wrong: str) -> None:
    """Long before parallel.timeout_s; each process hears it."""
    answers = _started(numbers, "gloo", _try_to_join)
    assert len(answers) == len(numbers)
    assert all(re.search(wrong, text) for _, text in answers), answers


def test_a_rank_that_was_started_again_is_no_second_one() -> None:
    """As pods are, while the others wait for it."""
    store = dist.HashStore()
    ended = subprocess.Popen(["true"])
    ended.wait()
    store.set("rank 1", f"{host()} process {ended.pid}")
    store.add("count 1", 1)
    store.add("come", 1)
    store.set("world size", "2")
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(LaunchError, match=r"rank\(s\) 0 did not come"):
        _meet(store, World(1, 2), 0.2)
    _meet(store, World(0, 2), 0.2)
    _meet(store, World(1, 2), 0.2)


def test_two_that_joined_are_a_world() -> None:
    assert _started([(0, 2), (1, 2)], "gloo", _try_to_join) == [(0, "joined"), (1, "joined")]


def _without_the_interface(told: Any) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="nosuch0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    try:
        with meeting(World(), 60):
            dist.init_process_group("gloo", timeout=TIMEOUT)
    except LaunchError as error:
        told.put(str(error))


def test_an_interface_that_is_not_there_is_named() -> None:
    context = mp.get_context("spawn")
    told = context.SimpleQueue()
    process = context.Process(target=_without_the_interface, args=(told,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert told.get().startswith("GLOO_SOCKET_IFNAME=nosuch0 in the environment: rank 0 has no such network interface")
