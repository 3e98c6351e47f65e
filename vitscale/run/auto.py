"""What parallel.zero_stage=auto and train.micro_batch=auto come to: planned for the memory that the ranks have, tried,
and kept for the next start."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
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

_FINE = 4  # trials after which a smaller one has half of it at most
_MUCH_SLOWER = 0.9  # of the images a second at a global batch nearby
_MORE_MEMORY = 1.25  # times what there was: then what ran out of it may be tried again


def settle(config: RunConfig, world: World, ranks: ProcessRanks, device: torch.device, folder: RunFolder) -> RunConfig:
    """The config without auto, the same on every rank: as this run's last start had it, where that has saved a
    checkpoint and still fits. Rank 0 says what was chosen, and why, and keeps it in the run's folder, unproven until
    `prove`. A collective.

    Raises ConfigError, on every rank, where nothing fits.
    """
    if not auto_keys(config):
        return config
    there = least(ranks, world, device)
    planner = Planner(config, Cluster.of(world, there.bytes))
    record = ranks.gather(_read(folder) if world.is_main else None)[0]
    before = _as_before(planner, record) if record is not None else None
    if before is not None and before.fits and record["proven"]:
        chosen, ratio, why = before, record["ratio"], "kept from the last start"
    else:
        if record is not None and world.is_main:
            print(_not_kept(record, before, there), flush=True)
        failed = _failed(config, record, there)
        chosen, ratio, why = tried(planner, there, ranks, device, record["ratio"] if failed else 1.0, failed)
        record = {"proven": False, "ran_out": record and record["ran_out"]}
    if world.is_main:
        print(f"auto: {told(config, chosen, there)}; {why}{_held_back(planner, chosen, ratio)}", flush=True)
        _write(folder, record | step_keys(chosen.config) | {"ratio": ratio, "room": there.bytes})
    return chosen.config


def prove(folder: RunFolder) -> None:
    """Steps and a save have passed by what this start has chosen: the next one may keep it."""
    record = _read(folder)
    if record is not None and not record["proven"]:
        _write(folder, record | {"proven": True})


def ran_out(folder: RunFolder, config: RunConfig) -> float:
    """A rank has run out of memory by what this start has chosen: the next one is to choose less. What activations take
    over what is counted, by the trial."""
    record = _read(folder)
    if record is None or not step_keys(config).items() <= record.items():
        return 1.0
    _write(folder, record | {"proven": False, "ran_out": step_keys(config) | {"room": record["room"]}})
    return record["ratio"]


def planned(config: RunConfig, world: World, ranks: ProcessRanks, device: torch.device) -> str:
    """What a run would choose now where its trial agrees with the plan. A collective; ConfigError as in `settle`."""
    there = least(ranks, world, device)
    planner = Planner(config, Cluster.of(world, there.bytes))
    choice = planner.choice()
    if choice is None:
        raise _nothing_fits(planner, there, [])
    return told(config, choice, there) + _held_back(planner, choice)


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
    """What the last start chose; None where there was none, or nobody can tell. room: bytes that there were; proven:
    whether a save has followed; ran_out: keys and room of what ran out of memory."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(folder.auto.read_text(encoding="utf-8"))
        found = {name: content[name] for name in (*step_keys(RunConfig()), "ratio")}
        return {"room": 0, "proven": True, "ran_out": None} | {**content, **found}
    return None


def _write(folder: RunFolder, record: dict[str, Any]) -> None:
    write_atomically(folder.auto, json.dumps(record) + "\n")


def _as_before(planner: Planner, record: dict[str, Any]) -> Estimate | None:
    """What the last start chose; None where this one cannot come to that."""
    for each in choices(planner.config, planner.cluster.world()):
        if step_keys(each).items() <= record.items():
            return planner.estimate(each, record["ratio"])
    return None


def _words(record: dict[str, Any]) -> str:
    return " ".join(f"{key}={record[key]}" for key in step_keys(RunConfig()))


def _not_kept(record: dict[str, Any], before: Estimate | None, there: Room) -> str:
    why = "and ended before it saved a checkpoint"
    if before is None:
        why = "which these keys and ranks do not allow"
    elif not before.fits:
        why = f"which needs {byte_size(before.memory.total_bytes)} of {byte_size(there.bytes)} {there.source}"
    elif record["ran_out"] and not record["proven"]:
        why = "which ran out of memory"
    return f"auto: the last start had {_words(record)}, {why}: chosen anew"


def _failed(config: RunConfig, record: dict[str, Any] | None, there: Room) -> RunConfig | None:
    """The config that has run out of memory in an earlier start, unless there is more of it now."""
    failed = record and record["ran_out"]
    if not failed or there.bytes > _MORE_MEMORY * failed["room"]:
        return None
    return with_step(config, *(failed[key] for key in step_keys(config)))


def tried(
    planner: Planner,
    there: Room,
    ranks: ProcessRanks,
    device: torch.device,
    ratio: float = 1.0,
    failed: RunConfig | None = None,
) -> tuple[Estimate, float, str]:
    """(what is planned and passes a trial on every rank, what its activations take over what is counted, why). A
    collective. ConfigError where nothing does.

    ratio: what is known of that; failed: what ran out of memory in an earlier start.
    """
    most: int | None = None
    attempts = [f"{_words(step_keys(failed))} ran out of memory before"] if failed else []
    while (choice := planner.choice(ratio, most, failed)) is not None:
        micro = choice.config.train.micro_batch
        counted = activations(choice.config, planner.cluster.device).of(micro).peak
        if "train.micro_batch" not in auto_keys(planner.config):
            return choice, ratio, "; ".join([*attempts, "planned"])
        if 4 * planner.parameters + counted > there.bytes:
            attempts.append("planned, and not tried: one rank has no memory for all weights")
            return choice, ratio, "; ".join(attempts)
        of_ranks = ranks.gather(trial(choice.config, device, there.bytes))
        if None in of_ranks:
            attempts.append(f"a trial of {micro} ran out of memory")
            most, failed = micro // 2, choice.config
            continue
        took = max(of_ranks)
        ratio = max(ratio, took / counted)
        if (again := planner.estimate(choice.config, ratio)).fits:
            plan = f"planned {byte_size(counted)}"
            attempts.append(f"the activations of a trial took {byte_size(took)}, {plan}")
            return again, ratio, "; ".join(attempts)
        attempts.append(f"by a trial {micro} would need {byte_size(again.memory.total_bytes)}")
        most = micro - 1 if len(attempts) < _FINE else micro // 2
    raise _nothing_fits(planner, there, attempts, ratio, most, failed)


def _nothing_fits(
    planner: Planner,
    there: Room,
    attempts: list[str],
    ratio: float = 1.0,
    most: int | None = None,
    failed: RunConfig | None = None,
) -> ConfigError:
    """ratio, most, failed: with which nothing was left to choose."""
    config, least_one = planner.config, planner.smallest()
    needed = planner.estimate(least_one.config, ratio).memory.total_bytes
    what, reasons = "nothing fits", list(attempts)
    if most is None or least_one.config.train.micro_batch <= most:
        what = "nothing that was tried fits" if most is not None else what
        reasons.append(f"the least that it can come to needs {byte_size(needed)}")
    room = there.bytes
    if failed is not None:
        room = min(room, planner.estimate(failed, ratio).memory.total_bytes - 1)
    ways = advice(config, planner.cluster.world(), room, ratio, most)
    keys = " ".join(f"{key}=auto" for key in auto_keys(config))
    return ConfigError(f"{keys}: {what} into {byte_size(there.bytes)} {there.source}: {'; '.join(reasons)}; {ways}")


def _held_back(planner: Planner, chosen: Estimate, ratio: float = 1.0) -> str:
    """What another global batch nearby would allow, where the divisors of a rank's share leave none but micro-batches
    by which steps are much slower; else nothing."""
    config, ranks = planner.config, planner.cluster.gpus
    share = config.train.global_batch // ranks
    unit = 1 << max(0, (share // 8).bit_length() - 1)
    near = round(share / unit) * unit
    if "train.micro_batch" not in auto_keys(config) or near == share:
        return ""
    train = replace(config.train, global_batch=near * ranks)
    with contextlib.suppress(ConfigError):  # other keys do not allow it
        other = Planner(replace(config, train=train), planner.cluster).choice(ratio)
        if other is not None and chosen.images_per_second < _MUCH_SLOWER * other.images_per_second:
            return (
                f"; warning: few numbers divide the {share:,} images of a rank, and larger micro-batches would be "
                f"faster: of train.global_batch={near * ranks} it would be {other.config.train.micro_batch}"
            )
    return ""
