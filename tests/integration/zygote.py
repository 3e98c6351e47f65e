"""Ranks that start in a second: a process imports torch and deepspeed once and forks every world from there.

`python -m tests.integration.zygote` reads a JSON line a world from stdin, {"ranks", "argv", "log", "kill", "nan",
"flip", "environment", "folders"}, forks the ranks, each of which runs `vitscale ARGV` as it would under torchrun, and
answers with their process ids at once and their exit codes at the end. "environment": what else than torchrun's
variables there is, null for one that is not there. "folders": the one that each rank starts in. With {"call":
{"module", "function", "arguments"}, "results"} for argv each rank calls a function and leaves what it returns as JSON.
Real processes, real gloo; only the import (7 s a launch) is shared.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tests.forked import be, be_command

# What a run imports only when it gets there: accelerate's optional parts and what they import, the compiler that
# DeepSpeed loads, sklearn.
IMPORTED = (
    "accelerate",
    "deepspeed.runtime.zero.muon.original_muon",
    "torch.distributed.fsdp",
    "transformers.integrations",
    "distutils.ccompiler",
    "vitscale.run.pretrain",
    "vitscale.evaluation.metrics",
)
# What survivors of a failed rank have to leave by themselves, before TERM and before KILL (torchrun: 0 and 30).
TERM_SECONDS, KILL_SECONDS = 5, 30


def _fork_world(request: dict[str, Any]) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, port, request)
        pids.append(pid)
    return pids


def _be_rank(rank: int, port: int, request: dict[str, Any]) -> None:
    ranks = str(request["ranks"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    changed = request.get("environment", {})
    os.environ.update({name: value for name, value in changed.items() if value is not None})
    for name in [name for name in changed if changed[name] is None]:
        del os.environ[name]
    if "folders" in request:
        os.chdir(request["folders"][rank])
    log = os.open(f"{request['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    kill = request.get("kill")
    if kill and kill["rank"] == rank:
        _disturb_save(kill["point"], kill["nth"], kill.get("until"))
    nan = request.get("nan")
    if nan and nan["rank"] == rank:
        _nan_pixels(nan["calls"])
    flip = request.get("flip")
    if flip and flip["rank"] == rank:
        _flip_a_bit(flip["step"])
    if "call" in request:
        be(lambda: _call(request["call"], Path(f"{request['results']}.{rank}")))
    be_command(request["argv"])


def _call(call: dict[str, Any], result: Path) -> int:
    value = getattr(importlib.import_module(call["module"]), call["function"])(**call["arguments"])
    result.write_text(json.dumps(value))
    return 0


def _disturb_save(point: str, nth: int, until: tuple[str, int] | None) -> None:
    """SIGKILL this rank the nth time that saving reaches a point; or hold it up until a file has so many lines."""
    from vitscale import faults

    seen = 0

    def at(reached: str, _: object) -> None:
        nonlocal seen
        seen += reached == point
        if reached != point or seen != nth:
            return
        while until is not None and Path(until[0]).read_bytes().count(b"\n") < until[1]:
            time.sleep(0.01)
        if until is None:
            os.kill(os.getpid(), signal.SIGKILL)

    faults.at_point = at


def _nan_pixels(calls: list[int]) -> None:
    """NaN in every pixel of these micro-batches of this rank, counted from 1."""
    from vitscale.augment.pipeline import Augment

    exact, seen = Augment.__call__, 0

    def call(self: Augment, batch: Any) -> Any:
        nonlocal seen
        seen += 1
        inputs = exact(self, batch)
        if seen in calls:
            inputs.pixel_values.fill_(float("nan"))
        return inputs

    Augment.__call__ = call  # type: ignore[method-assign]


def _flip_a_bit(step: int) -> None:
    """Change one bit of a weight of this rank after the update of a step of this start, at ZeRO stage 0."""
    import torch

    from vitscale.engine.ddp import DDPEngine

    exact, seen = DDPEngine._update, 0

    def update(self: DDPEngine) -> Any:
        nonlocal seen
        seen += 1
        result = exact(self)
        if seen == step:
            next(self.module.parameters()).data.view(torch.int32).view(-1)[0] ^= 1
        return result

    DDPEngine._update = update  # type: ignore[method-assign]


def _wait(pids: list[int]) -> list[int]:
    """Exit codes by rank, minus the signal for a killed one; as torchrun does, a failed rank ends the others."""
    codes: dict[int, int] = {}
    failed_at = float("inf")
    endings = {signal.SIGTERM: TERM_SECONDS, signal.SIGKILL: KILL_SECONDS}
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] != 0:
                    failed_at = min(failed_at, time.monotonic())
        for number, seconds in list(endings.items()):
            if time.monotonic() > failed_at + seconds:
                del endings[number]
                for pid in set(pids) - set(codes):
                    os.kill(pid, number)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _draw() -> None:
    """A figure with a logarithmic axis, as in a run's report: fonts and the grammar of formulas are read once."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_yscale("log")
    for form in ("svg", "png"):
        figure.savefig(io.BytesIO(), format=form)


def serve() -> None:
    """Answer requests until stdin ends."""
    from vitscale import world

    world.enter()
    for module in IMPORTED:
        importlib.import_module(module)
    _draw()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    gc.freeze()  # ZeRO-3 collects garbage at each start, which else looks at all that was imported
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        pids = _fork_world(json.loads(line))
        print(json.dumps({"pids": pids}), file=out, flush=True)
        print(json.dumps({"codes": _wait(pids)}), file=out, flush=True)


if __name__ == "__main__":
    serve()
