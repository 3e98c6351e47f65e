"""Named points of a run where it can be made to fail, by `vitscale chaos`, tests or hand. Otherwise they do nothing.

VITSCALE_FAULT="point=save.renamed action=kill rank=1 nth=2" in the environment: rank 1 is killed when it gets there for
the second time. Several are separated by semicolons. Where tensors are at hand (`TENSORS`) their numbers can be spoilt:
"point=batch action=nan rank=0 nth=9 times=3".
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vitscale.errors import LaunchError

POINTS = {
    "joined": "the ranks have met, index and order are known",
    "restored": "weights and state are loaded, no step is taken",
    "batch": "a micro-batch is about to be trained on",
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
TENSORS = {
    "batch": "the model's inputs, pixels first",
    "step": "what every rank holds whole: fixed tables first, then weights",
}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_NUMBERS = ("nan", "scale", "flip")  # what is done to tensors
_LOWEST_BIT = 1 << 16  # of a bf16, as it lies in an fp32
_RULE = (
    "must be point=NAME action=kill|stop|term|sleep:SECONDS|raise:ERRNO [rank=R] [nth=N] [times=K], at "
    f"{' and '.join(TENSORS)} also action=nan|scale:FACTOR|flip:PLACE_OF_TENSOR; points: "
)


@dataclass
class Fault:
    """What happens where."""

    point: str
    action: str
    argument: str
    rank: int | None  # None: on every rank
    nth: int  # at the n-th time that a process gets there
    times: int  # from then on
    seen: int = 0  # times that it got there


Tensors = Callable[[], Iterable[Any]]
at_point: Callable[[str, Tensors], None] | None = None  # what happens at each point, given its name


def arm(text: str, rank: int) -> None:
    """Take the faults of this rank from what VITSCALE_FAULT says. LaunchError for what is none."""
    global at_point
    faults = [_fault(each) for each in text.split(";") if each.strip()]
    own = [fault for fault in faults if fault.rank in (None, rank)]
    at_point = partial(_cause, own) if own else None


def fault_point(name: str, tensors: Tensors = tuple) -> None:
    """Here a run can be made to fail. tensors: what can be spoilt here, asked for where it is to be."""
    if at_point is not None:
        at_point(name, tensors)


def _fault(text: str) -> Fault:
    try:
        keys = dict(word.split("=", 1) for word in text.split())
        action, _, argument = keys.pop("action").partition(":")
        rank, nth, times = keys.pop("rank", None), int(keys.pop("nth", "1")), int(keys.pop("times", "1"))
        fault = Fault(keys.pop("point"), action, argument, None if rank is None else int(rank), nth, times)
        known = _is_known(fault)
    except (ValueError, KeyError):
        known = False
    if not known or keys or fault.point not in POINTS:
        raise LaunchError(f"VITSCALE_FAULT={text!r}: {_RULE}{', '.join(POINTS)}")
    return fault


def _is_known(fault: Fault) -> bool:
    """Whether its action is one, and can be done at its point. ValueError for an argument that is no number."""
    if fault.action == "raise":
        return hasattr(errno, fault.argument)
    if fault.action in _NUMBERS and fault.point not in TENSORS:
        return False
    if fault.action in (*_SIGNALS, "nan"):
        return not fault.argument
    if fault.action == "flip":
        return int(fault.argument) >= 0
    return fault.action in ("scale", "sleep") and float(fault.argument) >= 0


def _cause(faults: Sequence[Fault], name: str, tensors: Tensors) -> None:
    for fault in faults:
        if fault.point != name:
            continue
        fault.seen += 1
        if not fault.nth <= fault.seen < fault.nth + fault.times:
            continue
        if fault.action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[fault.action])
        elif fault.action == "sleep":
            time.sleep(float(fault.argument))
        elif fault.action in _NUMBERS:
            _spoil(fault, list(tensors()))
        else:
            number = getattr(errno, fault.argument)
            raise OSError(number, os.strerror(number), f"fault point {name}")


def _spoil(fault: Fault, tensors: list[Any]) -> None:
    """The first of the tensors, or of one tensor the first number, by the methods that torch's tensors have."""
    if fault.action == "nan":
        tensors[0].detach().fill_(float("nan"))
    elif fault.action == "scale":
        tensors[0].detach().mul_(float(fault.argument))
    else:
        number = tensors[int(fault.argument) % len(tensors)].detach().view(-1)[:1]
        (bits,) = struct.unpack("<I", struct.pack("<f", number.item()))
        number.fill_(struct.unpack("<f", struct.pack("<I", bits ^ _LOWEST_BIT))[0])
