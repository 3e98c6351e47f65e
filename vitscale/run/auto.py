"""What parallel.zero_stage=auto and train.micro_batch=auto come to: planned for the memory that the ranks have, tried,
and kept for the next start."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch

from vitscale.config.schema import RunConfig
from vitscale.config.step import auto_keys, choices, step_keys, with_step
from vitscale.engine.ranks import ProcessRanks
from vitscale.engine.room import Room, room
from vitscale.errors import ConfigError
from vitscale.files.atomic import write_atomically
from vitscale.planning.memory import activations
from vitscale.planning.plan import Cluster, Estimate, Planner, advice
from vitscale.planning.trial import trial
from vitscale.run_folder import RunFolder
from vitscale.text import byte_size
from vitscale.world import World

_TRIALS = 4


def settle(config: RunConfig, world: World, ranks: ProcessRanks, device: torch.device, folder: RunFolder) -> RunConfig:
    """The config without auto, the same on every rank: as this run's last start had it, where that still fits. Rank 0
    says what was chosen, and why, and keeps it in the run's folder. A collective.

    Raises ConfigError, on every rank, where nothing fits.
    """
    if not auto_keys(config):
        return config
    there = least(ranks, world, device)
    planner = Planner(config, Cluster.of(world, there.bytes))
    record = ranks.gather(_read(folder) if world.is_main else None)[0]
    chosen = _kept(planner, record) if record is not None else None
    if chosen is not None and chosen.fits:
        ratio, why = record["ratio"], "kept from the last start"
    else:
        if record is not None and world.is_main:
            print(_not_kept(record, chosen, there), flush=True)
        chosen, ratio, why = tried(planner, there, ranks, device)
    if world.is_main:
        print(f"auto: {told(config, chosen, there)}; {why}", flush=True)
        write_atomically(folder.auto, json.dumps(step_keys(chosen.config) | {"ratio": ratio}) + "\n")
    return chosen.config


def planned(config: RunConfig, world: World, ranks: ProcessRanks, device: torch.device) -> str:
    """What a run would choose now where its trial agrees with the plan. A collective; ConfigError as in `settle`."""
    there = least(ranks, world, device)
    planner = Planner(config, Cluster.of(world, there.bytes))
    choice = planner.choice()
    if choice is None:
        raise _nothing_fits(planner, there, [])
    return told(config, choice, there)


def least(ranks: ProcessRanks, world: World, device: torch.device) -> Room:
    """The room of the rank that has the least. A collective."""
    rooms = ranks.gather(room(world, device))
    rank = min(range(len(rooms)), key=lambda rank: rooms[rank].bytes)
    alike = all(each == rooms[0] for each in rooms)
    return rooms[0] if alike else Room(rooms[rank].bytes, f"{rooms[rank].source}, on rank {rank}, which has the least")


def told(config: RunConfig, chosen: Estimate, there: Room) -> str:
    """What the keys that are auto come to, and the memory that it takes."""
    values = step_keys(chosen.config)
    words = " ".join(f"{key}={values[key]}" for key in auto_keys(config))
    return f"{words}: {byte_size(chosen.memory.total_bytes)} of {byte_size(there.bytes)} {there.source}"


def as_before(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The config, with what this run's last start chose where it is auto; as it is where there was none."""
    record, auto = _read(folder), auto_keys(config)
    if record is None:
        return config
    stage, micro_batch = (record[key] if key in auto else value for key, value in step_keys(config).items())
    return with_step(config, stage, micro_batch)


def _read(folder: RunFolder) -> dict[str, Any] | None:
    """What the last start chose; None where there was none, or nobody can tell."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(folder.auto.read_text(encoding="utf-8"))
        return {name: content[name] for name in (*step_keys(RunConfig()), "ratio")}
    return None


def _kept(planner: Planner, record: dict[str, Any]) -> Estimate | None:
    """What the last start chose; None where this one cannot come to that."""
    for each in choices(planner.config, planner.cluster.world()):
        if step_keys(each).items() <= record.items():
            return planner.estimate(each, record["ratio"])
    return None


def _not_kept(record: dict[str, Any], before: Estimate | None, there: Room) -> str:
    words = " ".join(f"{key}={value}" for key, value in record.items() if key != "ratio")
    needs = "which these keys and ranks do not allow"
    if before is not None:
        needs = f"which needs {byte_size(before.memory.total_bytes)} of {byte_size(there.bytes)} {there.source}"
    return f"auto: the last start had {words}, {needs}: chosen anew"


def tried(planner: Planner, there: Room, ranks: ProcessRanks, device: torch.device) -> tuple[Estimate, float, str]:
    """(what is planned and passes a trial on every rank, what its activations take over what is counted, why). A
    collective. ConfigError where nothing does."""
    ratio, most, attempts = 1.0, None, []
    for _ in range(_TRIALS):
        choice = planner.choice(ratio, most)
        if choice is None:
            break
        micro = choice.config.train.micro_batch
        counted = activations(choice.config).of(micro).peak
        if "train.micro_batch" not in auto_keys(planner.config):
            return choice, ratio, "planned"
        if 4 * planner.parameters + counted > there.bytes:
            return choice, ratio, "planned, and not tried: one rank has no memory for all weights"
        of_ranks = ranks.gather(trial(choice.config, device, there.bytes))
        if None in of_ranks:
            attempts.append(f"a trial of {micro} ran out of memory")
            most = micro // 2
            continue
        took = max(of_ranks)
        ratio = max(ratio, took / counted)
        if (again := planner.estimate(choice.config, ratio)).fits:
            plan = f"planned {byte_size(counted)}"
            attempts.append(f"the activations of a trial took {byte_size(took)}, {plan}")
            return again, ratio, "; ".join(attempts)
        attempts.append(f"by a trial {micro} would need {byte_size(again.memory.total_bytes)}")
        most = micro - 1
    raise _nothing_fits(planner, there, attempts)


def _nothing_fits(planner: Planner, there: Room, attempts: list[str]) -> ConfigError:
    keys, smallest = " ".join(f"{key}=auto" for key in auto_keys(planner.config)), planner.smallest()
    reason = "; ".join(attempts) or f"the least that it can come to needs {byte_size(smallest.memory.total_bytes)}"
    ways = advice(planner.config, planner.cluster.world(), there.bytes)
    return ConfigError(f"{keys}: nothing fits into {byte_size(there.bytes)} {there.source}: {reason}; {ways}")
