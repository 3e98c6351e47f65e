"""A stage of the GPU suite and the process that runs it: named cases, each of which gives figures.

A case is a function that returns what it measured, raises Unable where this machine cannot run it, Unfinished
where its time was too short, and anything else where it fails. Every line of what it gives is in a file at once,
so that a crash or a hang in one case takes nothing of the others.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vitscale import world
from vitscale.bench.photographs import photograph_shards
from vitscale.bench.rounds import first_line
from vitscale.files.atomic import replaced

# What runs import when they get there; on a CPU, once for all of them.
_LIBRARIES = ("accelerate", "deepspeed", "matplotlib.figure", "pyarrow.parquet", "torch.distributed.fsdp",
              "deepspeed.runtime.zero.muon.original_muon")  # fmt: skip
USUAL_BUDGET_S = 480.0  # that of launch/gpu_suite.sh, which the limits are for
Figures = dict[str, Any]  # as JSON has it; "text" is its line in the summary
Cases = Mapping[str, Callable[[], Figures]]


class Unable(Exception):
    """This machine cannot run the case; the text says why."""


class Unfinished(Exception):
    """The time did not do for all of the case, which is to be run again; what it has noted is kept."""


class Mismatch(Exception):
    """Two results that must agree do not."""


@dataclass(frozen=True)
class Stage:
    """One stage of the suite; `cases` is MODULE:FUNCTION, called with a Setting, and gives its Cases."""

    letter: str
    title: str
    cases: str
    limit_s: float  # for all of it
    case_limit_s: float
    least_s: float  # it is not begun with less

    def of_budget(self, seconds: float) -> Stage:
        """With the limits that it has in a budget of so many seconds: a larger one than usual lengthens them."""
        more = max(1.0, seconds / USUAL_BUDGET_S)
        return replace(self, limit_s=more * self.limit_s, case_limit_s=more * self.case_limit_s)


@dataclass
class Setting:
    """What a stage's process needs to know."""

    device: str  # "cuda", or "cpu": everything at tiny sizes
    scratch: Path  # for shards and runs; gone after the suite
    out: Path  # for results
    deadline: float  # of time.monotonic(): the process is ended then
    settled: frozenset[str]  # cases that are not to be run
    earlier: Mapping[str, Mapping[str, Figures]]  # figures by stage and case, so far
    lines: Path  # the file that `emit` writes to
    images: Path | None = None  # shards of CIFAR-10, where there are some
    case_deadline: float = math.inf  # of the case that is going on

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    @property
    def measured_tflops(self) -> float | None:
        """The rate of stage a's bf16 matrix product, if that has passed."""
        matrix = self.earlier.get("a", {}).get("matrix")
        return None if matrix is None else matrix["tflops"]

    def seconds_left(self) -> float:
        """Until the case that is going on is ended: its own limit is reached, or that of the stage or the budget."""
        return min(self.deadline, self.case_deadline) - time.monotonic()

    def photographs(self) -> Path:
        """A folder of shards, made once a call: 20,000 JPEGs of 500x375, 256 distinct ones (on a CPU 256, 8)."""
        folder = self.scratch / "photographs"
        if not folder.exists():
            images, distinct = (256, 8) if self.tiny else (20_000, 256)
            with replaced(folder) as draft:
                photograph_shards(draft, images, distinct, shards=8)
        return folder

    def emit(self, **line: Any) -> None:
        """Hand a line to the runner."""
        with open(self.lines, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def note(self, figures: Figures) -> None:
        """Figures of a case that is still going on: they count if it is cut off."""
        self.emit(partial=figures)


def import_libraries() -> None:
    """What the forks of this process would else import one by one."""
    for module in _LIBRARIES:
        importlib.import_module(module)


def start_process(device: str, target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a fresh Python; on a CPU a fork of one that has imported the libraries, which CUDA would not survive."""
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def serve(stage: Stage, setting: Setting, log: Path) -> None:
    """Be the process of a stage: run the cases that are not settled, up to the first that fails.

    What a failed case leaves behind (memory, a broken CUDA context) must not reach the next one: for the rest
    the runner starts another process.
    """
    os.setsid()  # ended with all that it has started
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(stream, number)
    # A forked process has its parent's, with what these still hold.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    world.enter()
    module, name = stage.cases.split(":")
    try:
        cases: Cases = getattr(importlib.import_module(module), name)(setting)
    except Exception as error:
        traceback.print_exc()
        setting.emit(error=first_line(error))
        return
    setting.emit(expected=list(cases))
    for name, case in cases.items():
        if name not in setting.settled and not _run(name, case, stage.case_limit_s, setting):
            return
    setting.emit(finished=True)


def _run(name: str, case: Callable[[], Figures], limit_s: float, setting: Setting) -> bool:
    """Run one case; False where it failed."""
    began = time.monotonic()
    setting.case_deadline = began + limit_s
    print(f"== {name}")
    setting.emit(begun=name)
    state, figures, error = "passed", None, None
    try:
        figures = case()
    except Unable as reason:
        state, error = "cannot", str(reason)
    except Unfinished as reason:
        state, error = "cut", str(reason)
    except Exception as problem:
        traceback.print_exc()
        state, error = "failed", first_line(problem)
    setting.emit(case=name, state=state, seconds=time.monotonic() - began, figures=figures, error=error)
    return state != "failed"
