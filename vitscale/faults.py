"""Named points of a run where it can be made to fail, by `vitscale chaos`, tests or hand. Otherwise they do nothing.

VITSCALE_FAULT="point=save.renamed action=kill rank=1 nth=2" in the environment: rank 1 is killed when it gets there for
the second time. Several are separated by semicolons.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vitscale.errors import LaunchError

POINTS = {
    "joined": "the ranks have met, index and order are known",
    "restored": "weights and state are loaded, no step is taken",
    "step": "a step is taken, what the ranks tell each other of it is under way",
    "row": "a row is logged",
    "save.state_begun": "of a save: a rank's file is begun",
    "save.state_synced": "a rank's file is on the disk",
    "save.agreed": "all ranks' files are",
    "save.manifest_written": "the manifest is written",
    "save.manifest_synced": "and on the disk",
    "save.old_moved": "a checkpoint of the same step is moved away",
    "save.renamed": "the checkpoint is there",
    "save.root_synced": "and its name is on the disk",
    "save.retiring": "an old checkpoint is about to be removed",
    "save.retired": "old checkpoints are removed",
    "exported": "the model folder is written, at the end",
    "summary": "summary.json is written",
}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_RULE = "must be point=NAME action=kill|stop|term|sleep:SECONDS|raise:ERRNO [rank=R] [nth=N]; points: "


@dataclass
class Fault:
    """What happens where."""

    point: str
    action: str
    argument: str
    rank: int | None  # None: on every rank
    nth: int  # at the n-th time that a process gets there
    times: int = 0  # that it did


at_point: Callable[[str], None] | None = None  # what happens at each point, given its name


def arm(text: str, rank: int) -> None:
    """Take the faults of this rank from what VITSCALE_FAULT says. LaunchError for what is none."""
    global at_point
    faults = [_fault(each) for each in text.split(";") if each.strip()]
    own = [fault for fault in faults if fault.rank in (None, rank)]
    at_point = partial(_cause, own) if own else None


def fault_point(name: str) -> None:
    """Here a run can be made to fail."""
    if at_point is not None:
        at_point(name)


def _fault(text: str) -> Fault:
    try:
        keys = dict(word.split("=", 1) for word in text.split())
        action, _, argument = keys.pop("action").partition(":")
        rank, nth = keys.pop("rank", None), int(keys.pop("nth", "1"))
        fault = Fault(keys.pop("point"), action, argument, None if rank is None else int(rank), nth)
        known = fault.action in _SIGNALS or float(argument) >= 0 if action != "raise" else hasattr(errno, argument)
    except (ValueError, KeyError):
        known = False
    if not known or keys or fault.point not in POINTS:
        raise LaunchError(f"VITSCALE_FAULT={text!r}: {_RULE}{', '.join(POINTS)}")
    return fault


def _cause(faults: Sequence[Fault], name: str) -> None:
    for fault in faults:
        if fault.point != name:
            continue
        fault.times += 1
        if fault.times != fault.nth:
            continue
        if fault.action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[fault.action])
        elif fault.action == "sleep":
            time.sleep(float(fault.argument))
        else:
            number = getattr(errno, fault.argument)
            raise OSError(number, os.strerror(number), f"fault point {name}")
