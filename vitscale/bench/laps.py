"""Contenders that run all the time, each in processes of its own, and are measured in laps taken in turns."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import psutil

from vitscale.bench.rounds import figures, first_line, in_turns

Batches = Generator[int, None, None]  # how many samples each batch has; closing it ends its processes
Start = Callable[[], Batches]
WARM_UP = 8  # batches before a lap: past the start, and what was read ahead meanwhile
_LEAVING_S = 10.0


@dataclass(frozen=True)
class Lap:
    seconds: float  # a sample
    cpu_seconds: float  # a sample, of all processes


def run_laps(
    starts: Mapping[str, Start], seconds: float, rounds: int, packages: Mapping[str, str]
) -> tuple[dict[str, list[Lap]], dict[str, str]]:
    """The laps of every contender, and why others were left out.

    packages: what to install where a contender's module is not there, by the module's first name.
    """
    with contextlib.ExitStack() as running:
        contenders = {name: running.enter_context(_Contender(start)) for name, start in starts.items()}
        left_out = {}
        for name, contender in list(contenders.items()):
            try:
                contender.lap(0)  # waits until it runs
            except ModuleNotFoundError as error:
                package = packages.get((error.name or "").partition(".")[0])
                left_out[name] = f"not installed: pip install {package}" if package else first_line(error)
            except Exception as error:
                left_out[name] = first_line(error)
            if name in left_out:
                contenders.pop(name).close()
        return in_turns({name: partial(each.lap, seconds) for name, each in contenders.items()}, rounds), left_out


def lap_figures(laps: Mapping[str, list[Lap]], peer: str, floor: str | None = None) -> dict[str, dict[str, Any]]:
    """`figures` of contenders, with samples a second and CPU time; the ratio is None where the peer was left out.

    floor: whose rate is the most that there can be; "share" is what others reach of it.
    """
    seconds = {name: [lap.seconds for lap in own] for name, own in laps.items()}
    contenders = figures(seconds, peer if peer in laps else None)
    for name, own in laps.items():
        rates = [1 / lap.seconds for lap in own]
        contenders[name] |= {
            "per_second": statistics.median(rates),
            "per_second_spread": [min(rates), max(rates)],
            "cpu_ms": statistics.median(lap.cpu_seconds for lap in own) * 1000,
        }
        if floor is not None and floor in laps:
            shares = [least.seconds / lap.seconds for least, lap in zip(laps[floor], own, strict=True)]
            contenders[name] |= {"share": statistics.median(shares)}
    return contenders


def lap(batches: Batches, seconds: float) -> Lap:
    """As many batches as take so long, one at least."""
    samples = 0
    cpu_before = cpu_seconds()
    began = time.perf_counter()
    while True:
        samples += next(batches)
        elapsed = time.perf_counter() - began
        if elapsed >= seconds:
            return Lap(elapsed / samples, (cpu_seconds() - cpu_before) / samples)


class _Contender:
    """A process that makes batches between its laps too, as far as it reads ahead. Close it, or use it in a `with`."""

    def __init__(self, start: Start) -> None:
        # A fork has imported everything; no process here has started threads.
        context = multiprocessing.get_context("fork")
        self._orders, orders = context.Pipe()
        self._process = context.Process(target=_serve, args=(start, orders, self._orders))
        self._process.start()
        orders.close()

    def lap(self, seconds: float) -> Lap:
        with contextlib.suppress(BrokenPipeError):
            self._orders.send(seconds)
        try:
            answer = self._orders.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Lap)
        return answer

    def close(self) -> None:
        self._orders.close()
        self._process.join(_LEAVING_S)
        if self._process.is_alive():
            for each in psutil.Process(self._process.pid).children(recursive=True):
                each.kill()
            self._process.kill()
            self._process.join()

    def __enter__(self) -> _Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(start: Start, orders: Connection, other_end: Connection) -> None:
    """A lap for each number of seconds that comes, until the other end closes."""
    other_end.close()
    quiet()  # libraries tell of GPUs that are not there, and of their own ends
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            with contextlib.closing(start()) as batches:
                while True:
                    seconds = orders.recv()
                    for _ in range(WARM_UP):
                        next(batches)
                    orders.send(lap(batches, seconds))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            known = isinstance(error, ModuleNotFoundError)
            orders.send(error if known else RuntimeError(first_line(error)))
    os._exit(0)


def quiet() -> None:
    """Send what this process writes to standard error nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def cpu_seconds() -> float:
    """CPU time of this process and the living ones below it."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)
