"""Exchanges of small values between ranks, over gloo on the CPU; gradients go another way."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vitscale import heartbeat
from vitscale.engine.preempt import POLL_SECONDS, StopRequested
from vitscale.errors import InfrastructureError, LaunchError
from vitscale.text import listed
from vitscale.world import World, host, meeting_place, meeting_store, network_interface

_exchange = partial(heartbeat.phase, "exchange")
_TELLING_S = 5.0  # that rank 0 waits for others to hear why they cannot be a world
_joins = itertools.count()  # of this process: each has keys of its own in the store


class ProcessRanks:
    """The ranks of the default process group; one rank needs no group.

    Its methods are collectives: every rank calls them, in the same order.
    """

    def __init__(self, timeout: timedelta, apart: bool = False) -> None:
        """apart: over a group of their own, as a thread needs it; all ranks make it at the same time."""
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.stop_requested: Callable[[], bool] | None = None  # in training: what `check_stop` asks
        self._calls, self._left, self._checked = 1, 1, time.monotonic()  # between two exchanges of `check_stop`
        # The heartbeat is the main thread's.
        self._waiting: Callable[[], AbstractContextManager[None]] = nullcontext if apart else _exchange
        self._group: Any = None
        if self.world_size > 1:
            # NCCL would need the values on the GPU, and would queue behind its kernels.
            same = dist.get_backend() == "gloo" and not apart
            self._group = dist.group.WORLD if same else dist.new_group(backend="gloo", timeout=timeout)
            # Ranks that first talk to each other ask the store for the way, which is rank 0's and leaves with it: those
            # of the last barrier know it from here on.
            self.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._waiting():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on rank 0; nothing on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size if self.rank == 0 else []
        with self._waiting():
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
        with self._waiting():
            dist.all_gather(of_ranks, local, group=self._group)
        totals = torch.zeros_like(local)
        for of_rank in of_ranks:
            totals += of_rank
        return dict(zip(names, totals.tolist(), strict=True))

    def start_sum(self, values: Mapping[str, float]) -> PendingSum:
        """Sums by name, added while this rank does other things; every rank has the same bits, in whatever order added.

        Every rank gives the same names. One at a time: what is pending is finished before the next one is started.
        """
        return PendingSum(self, values)

    def sum_in_place(self, value: torch.Tensor) -> None:
        """A tensor of any device becomes its sum over the ranks, the same bits on every rank."""
        if self.world_size == 1:
            return
        summed = value.detach().cpu()
        with self._waiting():
            dist.all_reduce(summed, group=self._group)
        value.detach().copy_(summed)

    def have_same(self, digest: bytes) -> bool:
        """Whether all ranks give the same digest, by its first 7 bytes."""
        number = int.from_bytes(digest[:7], "big")
        bounds = torch.tensor([number, -number])
        if self.world_size > 1:
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._group)
        return bounds.tolist() == [number, -number]  # no rank has a larger one, and none a smaller one

    def broadcast(self, data: bytes | None, source: int = 0) -> bytes:
        """The bytes of rank `source`, on every rank; the others give None."""
        assert (data is not None) == (self.rank == source), "one rank alone has what is broadcast"
        if self.world_size == 1:
            assert data is not None
            return data
        size = torch.tensor([len(data) if data is not None else 0])
        with self._waiting():
            dist.broadcast(size, src=source, group=self._group)
            content = torch.empty(int(size), dtype=torch.uint8)
            if data is not None:
                content.copy_(torch.tensor(np.frombuffer(data, dtype=np.uint8)))
            dist.broadcast(content, src=source, group=self._group)
        return content.numpy().tobytes()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            with self._waiting():
                dist.barrier(group=self._group)

    def check_stop(self) -> None:
        """Call this between the parts of long work, equally often on all ranks: StopRequested on all of them, at the
        same call, once any was asked to stop. Only in training. A collective about once a second, by the time that
        earlier calls took."""
        if self.stop_requested is None:
            return
        self._left -= 1
        if self._left > 0:
            return
        now = time.monotonic()
        sums = self.sum({"stop": self.stop_requested(), "seconds": now - self._checked})
        calls_a_poll = self._calls * POLL_SECONDS * self.world_size / max(sums["seconds"], 1e-9)
        self._calls = self._left = max(1, min(2 * self._calls, int(calls_a_poll)))
        self._checked = now
        if sums["stop"] > 0:
            raise StopRequested


class PendingSum:
    """Sums over the ranks that are under way, see ProcessRanks.start_sum."""

    def __init__(self, ranks: ProcessRanks, values: Mapping[str, float]) -> None:
        self._names = sorted(values)
        self._sums = torch.tensor([values[name] for name in self._names], dtype=torch.float64)
        self._work: dist.Work | None = None
        self._waiting = ranks._waiting
        if ranks.world_size > 1:
            self._work = dist.all_reduce(self._sums, group=ranks._group, async_op=True)

    def finish(self) -> dict[str, float]:
        """The sums, once they are there."""
        if self._work is not None:
            with self._waiting():
                self._work.wait()
        return dict(zip(self._names, self._sums.tolist(), strict=True))


@contextlib.contextmanager
def meeting(world: World, timeout_s: float) -> Iterator[None]:
    """Around what joins the ranks: LaunchError where they cannot meet; InfrastructureError where our launcher has named
    the place, so that a rank or its node is gone."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise (InfrastructureError if world.supervised else LaunchError)(
            f"{meeting_place()} parallel.timeout_s={timeout_s}: rank {world.rank} of {world.world_size} cannot meet "
            f"the others there ({reason}); name rank 0's host and a port that is free on it, "
            "and start every rank"
        ) from None
    except RuntimeError as error:
        interface = network_interface()
        if interface is None or interface not in str(error):
            raise
        raise LaunchError(
            f"GLOO_SOCKET_IFNAME={interface} in the environment: rank {world.rank} has no such network interface; "
            "unset it, or name one that every node has (ip -brief address)"
        ) from None


def join(world: World, backend: str, timeout_s: float) -> None:
    """Make the default process group of two ranks or more, once all have come to the launcher's meeting place.

    LaunchError, on every rank, where a rank came twice or with another WORLD_SIZE, and where one did not come in time.
    """
    address, port, opens = meeting_store()
    timeout = timedelta(seconds=timeout_s)
    with meeting(world, timeout_s):
        store = dist.TCPStore(
            address, port, world.world_size, opens and world.is_main, timeout, wait_for_workers=False, multi_tenant=True
        )
        # torch names its groups alike each time: the addresses of one that was left would be taken for this one's.
        own = dist.PrefixStore(f"vitscale-{next(_joins)}", store)
        _meet(own, world, timeout_s)
        dist.init_process_group(backend, timeout=timeout, store=own, rank=world.rank, world_size=world.world_size)


def _meet(store: dist.Store, world: World, timeout_s: float) -> None:
    """Wait for the others at the store; whoever sees that they cannot be a world tells all of them."""
    own = f"RANK={world.rank} WORLD_SIZE={world.world_size} on {host()}"
    first = store.compare_set(f"rank {world.rank}", "", f"{host()} process {os.getpid()}").decode()
    size = int(store.compare_set("world size", "", str(world.world_size)))
    store.add("processes", 1)
    is_first = store.add(f"count {world.rank}", 1) == 1
    if not is_first and not _is_gone(first):
        store.set("verdict", f"{own}: another process has come with this RANK ({first}): each needs its own")
    elif size != world.world_size:
        store.set("verdict", f"{own}: another process has come with WORLD_SIZE={size}: all need the same")
    elif is_first and store.add("come", 1) == size:
        store.set("verdict", "all are here")
    try:
        verdict = store.get("verdict").decode()
    except dist.DistStoreError:
        absent = [rank for rank in range(world.world_size) if not store.check([f"rank {rank}"])]
        # A launcher of ours has started them all: one of them, or its node, has been lost since.
        raise (InfrastructureError if world.supervised else LaunchError)(
            f"{meeting_place()} parallel.timeout_s={timeout_s}: rank {world.rank} of {world.world_size} has waited for "
            f"the others there: rank(s) {listed(absent)} did not come; look at their logs, and start every rank"
        ) from None
    if verdict != "all are here":
        store.add("told", 1)
        ends = time.monotonic() + _TELLING_S
        while world.is_main and store.add("told", 0) < store.add("processes", 0) and time.monotonic() < ends:
            time.sleep(0.05)  # the store goes with this process
        raise LaunchError(f"{verdict}; start the processes with launch/torchrun.sh, launch/slurm.sh or torchrun")


def _is_gone(process: str) -> bool:
    """Whether a process that came before is one of this machine that has ended, and was started again as this one."""
    machine, _, number = process.split(" ")
    return machine == host() and (int(number) == os.getpid() or not os.path.exists(f"/proc/{number}"))


@contextlib.contextmanager
def joined(world: World, timeout_s: float) -> Iterator[ProcessRanks]:
    """The ranks of a launcher as a process group over gloo, where nothing trains; one rank needs no group."""
    timeout = timedelta(seconds=timeout_s)
    if world.device == "cuda":
        torch.cuda.set_device(world.local_rank)
    if world.world_size == 1:
        yield ProcessRanks(timeout)
        return
    join(world, "gloo", timeout_s)
    yield ProcessRanks(timeout)
    dist.destroy_process_group()  # not after an error: the others would be waited for
