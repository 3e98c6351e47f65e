"""Which cores a rank is pinned to, on machines that a folder stands for, and that its processes stay on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.on_ranks import run_config
from tests.integration.worlds import Launcher
from vitscale import world
from vitscale.engine import affinity
from vitscale.engine.affinity import Place, _node_of, share
from vitscale.engine.backend import Backend

HOST = Place("host", tuple(range(32)), -1, False)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two sockets of 8 cores with two threads: core n has the threads n and n + 16, and every second is of node 1."""
    for node in (0, 1):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(str(cpu) for cpu in range(32) if cpu % 2 == node) + "\n")
    for cpu in range(32):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 16},{cpu % 16 + 16}\n")
    return tmp_path


def shares(places: list[Place], system: Path) -> list[list[int] | None]:
    return [share(places, rank, system) for rank in range(len(places))]


def test_whole_cores_of_the_node_that_the_gpu_is_at(machine: Path) -> None:
    """Of ranks 0 and 2 it is node 1."""
    cut = shares([Place("host", HOST.cores, node, False) for node in (1, 0, 1, 0)], machine)
    assert sorted(cpu for part in cut for cpu in part or []) == list(range(32))
    for part, node in zip(cut, (1, 0, 1, 0), strict=True):
        assert part is not None
        assert {cpu % 2 for cpu in part} == {node}
        assert {cpu % 16 for cpu in part if cpu < 16} == {cpu % 16 for cpu in part if cpu >= 16}, "a core is cut"


@pytest.mark.parametrize(("cores", "ranks"), [(32, 2), (32, 3), (31, 3), (29, 7), (8, 2)])
def test_even_parts_of_what_may_be_used(machine: Path, cores: int, ranks: int) -> None:
    """None is smaller than what World.cores_per_rank is without it."""
    allowed = HOST.cores[-cores:]
    cut = shares([Place("host", allowed, 1, False)] * ranks, machine)
    assert sorted(cpu for part in cut for cpu in part or []) == list(allowed)
    assert min(len(part or []) for part in cut) >= cores // ranks


def test_other_hosts_do_not_count(machine: Path) -> None:
    places = [Place(host, HOST.cores, -1, False) for host in ("one", "two", "one", "two")]
    cut = shares(places, machine)
    assert cut[0] == cut[1] != cut[2] == cut[3]


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    assert shares([HOST] * 2, tmp_path) == [list(range(16)), list(range(16, 32))]


@pytest.mark.parametrize("places", [
    [HOST],
    [HOST] * 9,
    [Place("host", (0, 1), -1, False)] * 2,
    [Place("host", tuple(range(16)), -1, False), Place("host", tuple(range(16, 32)), -1, False)],
    [HOST, Place("host", tuple(range(31)), -1, False)],
    [HOST, Place("host", HOST.cores, -1, True)],
], ids=["one rank", "few cores each", "small machine", "bound by Slurm", "bound otherwise", "OpenMP"])  # fmt: skip
def test_is_left_as_it_is(machine: Path, places: list[Place]) -> None:
    assert shares(places, machine) == [None] * len(places)


@pytest.mark.parametrize(("name", "value", "bound"), [
    ("OMP_PROC_BIND", "close", True), ("OMP_PROC_BIND", "FALSE", False), ("GOMP_CPU_AFFINITY", "0-3", True),
    ("KMP_AFFINITY", "compact", True), ("OMP_PLACES", "cores", True), ("OMP_NUM_THREADS", "4", False)
])  # fmt: skip
def test_who_binds_threads(monkeypatch: pytest.MonkeyPatch, name: str, value: str, bound: bool) -> None:
    monkeypatch.setenv(name, value)
    assert world.binds_threads() is bound


def test_the_node_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bus/pci/devices/0000:c1:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("1\n")
    about = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert _node_of(torch.device("cuda", 0), tmp_path) == 1
    about.pci_bus_id = 2
    assert _node_of(torch.device("cuda", 0), tmp_path) == -1
    assert _node_of(torch.device("cpu"), tmp_path) == -1


def of_rank(least: int) -> dict[str, Any]:
    """What a rank, an older thread of it and a process that it starts may use."""
    affinity.LEAST = least
    own, told, asked = world.read_world(), threading.Event(), threading.Event()
    before, cores_per_rank = sorted(os.sched_getaffinity(0)), own.cores_per_rank
    of_thread: list[int] = []

    def thread() -> None:
        asked.wait()
        of_thread.extend(sorted(os.sched_getaffinity(0)))
        told.set()

    threading.Thread(target=thread, daemon=True).start()
    backend = Backend(run_config(ranks=2), own)
    asked.set()
    told.wait()
    program = "import json, os; print(json.dumps(sorted(os.sched_getaffinity(0))))"
    child = json.loads(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout)
    after = sorted(os.sched_getaffinity(0))
    backend.close()
    return {"before": before, "after": after, "thread": of_thread, "child": child,
            "cores_per_rank": [cores_per_rank, own.cores_per_rank]}  # fmt: skip


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_a_rank_and_what_it_starts(launcher: Launcher) -> None:
    one, other = launcher.call(of_rank, 2, least=1)
    assert one["before"] == other["before"] == sorted(one["after"] + other["after"])
    for rank in (one, other):
        assert rank["after"] == rank["thread"] == rank["child"]
        assert rank["cores_per_rank"][0] == rank["cores_per_rank"][1]


def test_a_rank_of_a_small_machine(launcher: Launcher) -> None:
    for rank in launcher.call(of_rank, 2, least=len(os.sched_getaffinity(0))):
        assert rank["before"] == rank["after"] == rank["child"]
