"""Cores of its own for each rank of a node, near its GPU: the system else moves its threads between sockets.

Whatever a rank starts (reader, writer of checkpoints) runs there too. What a rank had before it keeps: an even part of
the cores that all ranks of the node may use, as many as its reader has threads. Where that is less than LEAST, or
something has bound ranks or threads already, nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitscale import world
from vitscale.engine.ranks import ProcessRanks

# A rank's main thread, backward, collectives, reader, writer and tracking want to run at the same time: on fewer cores
# they need those that another rank happens not to use.
LEAST = 4
_SYSTEM = Path("/sys")


@dataclass(frozen=True)
class Place:
    """Where a rank is, before it is pinned."""

    host: str
    cores: tuple[int, ...]  # that it may use
    node: int  # of memory, that its GPU is at; -1: not known
    bound: bool  # whether the environment binds its threads


def pin(ranks: ProcessRanks, device: torch.device) -> str | None:
    """Pin this process to its share, if there is one; what was done, in a line. A collective."""
    place = Place(world.host(), tuple(sorted(os.sched_getaffinity(0))), _node_of(device), world.binds_threads())
    places: list[Place] = ranks.gather(place)
    cores = share(places, ranks.rank)
    if cores is None:
        return None
    world.pin(cores)
    return f"each rank has {len(cores)} of {len(place.cores)} cores for itself (parallel.pin_cores)"


def share(places: Sequence[Place], rank: int, system: Path = _SYSTEM) -> list[int] | None:
    """The cores that a rank is to run on, or None: as it is. places: of all ranks; system: /sys of this rank's host.

    Both the cores and the ranks of a host stand in the order of its memory nodes, threads of a core side by side, and
    are cut into even parts: every rank is then as near to its GPU as an even cut allows.
    """
    own = places[rank]
    here = [other for other, place in enumerate(places) if place.host == own.host]
    alike = all(places[other].cores == own.cores and not places[other].bound for other in here)
    if len(here) == 1 or not alike or len(own.cores) < LEAST * len(here):
        return None
    number = sorted(here, key=lambda other: (places[other].node, other)).index(rank)
    ordered, count = _side_by_side(own.cores, system), len(own.cores)
    return ordered[number * count // len(here) : (number + 1) * count // len(here)]


def _side_by_side(cores: Sequence[int], system: Path) -> list[int]:
    """Cores by memory node, threads of one physical core beside each other; by number where the system does not say."""
    nodes = {
        core: int(folder.name.removeprefix("node"))
        for folder in (system / "devices/system/node").glob("node[0-9]*")
        for core in _listed(folder / "cpulist")
    }

    def place(core: int) -> tuple[int, int, int]:
        siblings = _listed(system / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        return nodes.get(core, 0), min(siblings, default=core), core

    return sorted(cores, key=place)


def _listed(path: Path) -> list[int]:
    """The numbers in a file such as 0-3,8,10-11; none where it cannot be read."""
    try:
        spans = [part.partition("-") for part in path.read_text(encoding="ascii").strip().split(",") if part]
    except OSError:
        return []
    return [number for first, _, last in spans for number in range(int(first), int(last or first) + 1)]


def _node_of(device: torch.device, system: Path = _SYSTEM) -> int:
    if device.type != "cuda":
        return -1
    about: Any = torch.cuda.get_device_properties(device)
    try:
        address = f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"
        return int((system / "bus/pci/devices" / address / "numa_node").read_text(encoding="ascii"))
    except (AttributeError, OSError):  # an older torch, or a container without /sys: an even cut all the same
        return -1
