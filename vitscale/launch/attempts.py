"""attempts.jsonl in a run's folder: a row when a start of the run has begun, one when it has ended; restarts by it.

Whoever writes a row may die before: an attempt without its second row was ended together with its launcher.
"""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime
from typing import Any

from vitscale.checkpoint.store import newest_step
from vitscale.errors import LaunchError
from vitscale.lease import folder_gone
from vitscale.run_folder import BAD_INPUT, FAILED, ROLLED_BACK, STOP_REASON, STOPPED, STOPPED_EARLY, RunFolder
from vitscale.tracking.jsonl import JsonlFile, parse_row

Row = dict[str, Any]
_EXIT_PATIENCE_S = 10.0  # for what a rank wrote on another node shortly before its end


def next_attempt(folder: RunFolder, nodes: int) -> str:
    """An id for the attempt that is about to start: its number, which several nodes count alike; on one node also this
    process, which tells it from another start at the same moment."""
    number = 1 + sum("began" in row for row in _rows(folder))
    return str(number) if nodes > 1 else f"{number}.{os.getpid()}"


def begin(folder: RunFolder, ranks: int, most_restarts: int, bounded: bool = False) -> None:
    """Rank 0 has entered the run.

    bounded: raise LaunchError where the attempts before died too often in a row, together with their launchers, which
    else would have counted them. As that is how this attempt ends, the next one is not refused.
    """
    rows = _rows(folder)
    failures = _failures_in_a_row(rows) if rows and bounded else 0
    row: Row = {"attempt": folder.attempt, "began": _now(), "host": socket.gethostname(), "ranks": ranks}
    row |= {"job": os.environ.get("SLURM_JOB_ID"), "step": newest_step(folder.checkpoints)}
    row |= {"restarts_without_progress": most_restarts}
    JsonlFile(folder.attempts).append(row)
    if failures > most_restarts:
        raise LaunchError(
            f"{failures} attempts in a row ended before they saved a new checkpoint, the last one with its launcher: "
            f"more than parallel.restarts_without_progress={most_restarts} restarts; attempts.jsonl has all of them. "
            "Mend the cause, lower checkpoint.every_steps or raise the key, then give the same command"
        )


def ending(folder: RunFolder, patience_s: float = _EXIT_PATIENCE_S) -> int:
    """The exit code of an attempt whose ranks have ended. Where the run had begun, and none of them said why it ended,
    exit.json is written here; else it may be that of another start. FolderLost where the folder is gone."""
    record = folder.await_exit(patience_s)
    if record is not None:
        return int(record["code"])
    if not folder.path.exists():  # the launcher had it
        raise folder_gone(folder.path)
    began = [row["attempt"] for row in _rows(folder) if "began" in row]
    if folder.attempt not in began:  # refused, as another start at the same moment was quicker; else it broke down
        return BAD_INPUT if folder.is_taken() else FAILED
    if not is_last(folder):  # it has lost its lease, and another start has the folder
        return BAD_INPUT
    reason = "the ranks were ended from outside: a signal, a limit of memory, or their node is gone"
    folder.write_exit(STOPPED, None, reason)
    return STOPPED


def is_last(folder: RunFolder) -> bool:
    """Whether no other attempt has begun after this one has."""
    return [row["attempt"] for row in _rows(folder) if "began" in row][-1:] == [folder.attempt]


def conclude(folder: RunFolder, code: int) -> int:
    """Record that an attempt has ended; its exit code, or FAILED where STOPPED would start it again once too often."""
    rows = _rows(folder)
    own = [row for row in rows if row["attempt"] == folder.attempt]
    if not own:  # it never began
        return code
    if "ended" in own[-1]:  # by another node's launcher
        return int(own[-1]["code"])
    reason, most = (folder.read_exit() or {"reason": "no exit.json"})["reason"], own[0]["restarts_without_progress"]
    failures = _failures_in_a_row([*rows, _end_row(folder, code, reason)])
    if failures > most:
        code = FAILED
        early = "give a start more time until it is stopped (a longer time limit), " * reason.startswith(STOPPED_EARLY)
        reason = (
            f"{failures} attempts in a row were ended by the infrastructure, or stopped before their first step, and "
            f"saved no new checkpoint: more than parallel.restarts_without_progress={most} restarts; the last one by: "
            f"{reason}; attempts.jsonl has all of them. Mend the cause, {early}lower checkpoint.every_steps or raise "
            "the key, then give the same command"
        )
        folder.write_exit(code, None, reason, replaces=True)
    end(folder, code, reason)
    return code


def end(folder: RunFolder, code: int, reason: str) -> None:
    """The attempt has ended."""
    JsonlFile(folder.attempts).append(_end_row(folder, code, reason))


def restarts_here(folder: RunFolder, most: int) -> bool:
    """Whether the infrastructure ended the last attempt, with no more than `most` in a row without a new checkpoint; or
    it has rolled back, which guard.max_rollbacks bounds."""
    rows = _rows(folder)
    if most == 0 or not rows:
        return False
    rolled_back = rows[-1].get("code") == STOPPED and rows[-1]["reason"].startswith(ROLLED_BACK)
    return rolled_back or (by_infrastructure(rows[-1]) and _failures_in_a_row(rows) <= most)


def by_infrastructure(row: Row) -> bool:
    """Whether an attempt whose second row this is was ended by the infrastructure."""
    return row.get("code") == STOPPED and not row["reason"].startswith((STOP_REASON, ROLLED_BACK))


def summary_of(folder: RunFolder) -> str:
    """How many attempts there were, and how many were ended by the infrastructure and on request."""
    rows = _rows(folder)
    starts = [row for row in rows if "began" in row]
    ends = {row["attempt"]: row for row in rows if "ended" in row}
    unsaid = sum(row["attempt"] not in ends for row in starts[:-1])  # the last one may be running
    faults = sum(map(by_infrastructure, ends.values()))
    stops = sum(row["code"] == STOPPED for row in ends.values()) - faults
    return f"{len(starts)} (faults of the infrastructure: {faults + unsaid}; stopped on request: {stops})"


def _failures_in_a_row(rows: list[Row]) -> int:
    """The newest attempts that the infrastructure ended, or that were stopped before their first step, since the newest
    checkpoint was made."""
    ends = {row["attempt"]: row for row in rows if "ended" in row}
    newest, count = rows[-1]["step"], 0
    for row in reversed([row for row in rows if "began" in row]):
        end = ends.get(row["attempt"])
        if row["step"] != newest or not (end is None or by_infrastructure(end) or _is_early(end)):
            break
        count += 1
    return count


def _is_early(end: Row) -> bool:
    """Whether an attempt was stopped before it could save anything, as by a time limit that its start does not fit."""
    return end["code"] == STOPPED and end["reason"].startswith(STOPPED_EARLY)


def _end_row(folder: RunFolder, code: int, reason: str) -> Row:
    last = JsonlFile(folder.metrics).last()
    reached = 0 if last is None else last["step"]
    row: Row = {"attempt": folder.attempt, "ended": _now(), "code": code, "reason": reason}
    return row | {"step": newest_step(folder.checkpoints), "reached": reached}


def _rows(folder: RunFolder) -> list[Row]:
    """Those that are whole: on a network file system two nodes' can run into each other."""
    if not folder.attempts.exists():
        return []
    lines = folder.attempts.read_bytes().splitlines()
    return [row for line in lines if (row := parse_row(line)) is not None]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
