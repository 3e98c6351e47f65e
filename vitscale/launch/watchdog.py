"""Watches the ranks of a node: one that hangs is named, with what it waits in, and the run ends to be started again.

How long a rank may give no sign of life depends on what it is in (see `Limits`): ranks that only wait for others get
longer, so that the node of the one they wait for speaks first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from vitscale.config.schema import RunConfig
from vitscale.heartbeat import PULSE_BYTES, STACKS, Pulse
from vitscale.run_folder import STOPPED, RunFolder
from vitscale.text import listed, to_stderr

_POLL_S = 1.0
_PRINTING_S = 1.0  # for stacks
_MOST_STACKS = 1 << 20  # bytes of a rank
_SAYING_S = 10.0  # for exit.json
_LEAVING_S = 30.0  # for torchrun, once its ranks are gone
_EXIT_BARRIER_S = 330.0  # for torchrun, whose ranks have ended: it waits 300 s for those of other nodes
_SPEAKS_BEFORE = 0.9  # of the time at which gloo or NCCL give up
_LONG = 6  # times parallel.timeout_s, for what may take long: see run/saves.py


@dataclass(frozen=True)
class Limits:
    """Seconds without a sign of life."""

    patience_s: float
    timeout_s: float
    data_s: float  # in which the rank itself ends with a line about its storage

    @staticmethod
    def of(config: RunConfig) -> Limits:
        return Limits(config.parallel.hang_s, config.parallel.timeout_s, config.data.patience_s)

    def of_phase(self, phase: str, behind: bool) -> float | None:
        """For a rank in `phase`; None: without limit. behind: another rank of the node is further."""
        if phase in ("start", "end"):
            return None  # compiling, the first step, the model's export: others that wait end by parallel.timeout_s
        if phase == "data":
            return self.data_s + self.patience_s
        if phase in ("digest", "save", "validation", "evaluation"):
            return _LONG * self.timeout_s
        if phase == "exchange" or (phase == "step" and not behind):
            return _SPEAKS_BEFORE * self.timeout_s
        return self.patience_s


@dataclass
class _Watched:
    """A rank as it was at the last look."""

    pulse: Pulse
    quiet_s: float = 0.0  # without a beat; counted in looks, so that a suspended machine is no alarm
    told: bool = False  # that it waits long for data


@dataclass(frozen=True)
class Late:
    """A rank that hangs, in words."""

    pulse: Pulse
    line: str


class Watchdog:
    """Looks at the pulses in a folder; use it in a `with`.

    The folder lies among temporary files, which are cleaned away once they are old: files stay open from when they are
    first seen, and the folder is locked, which systemd-tmpfiles heeds. A rank writes both before it shows its pulse.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder, self._limits = folder, limits
        self._watched: dict[int, _Watched] = {}
        self._files: dict[int, tuple[int, int]] = {}  # of a rank, open: its pulse and its stacks
        self._alone_s = 0.0  # for which no rank lives
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Watchdog:
        with contextlib.suppress(OSError):
            fcntl.flock(self._opened(self._folder), fcntl.LOCK_SH | fcntl.LOCK_NB)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def look(self, passed_s: float) -> list[Late]:
        """The ranks that hang, `passed_s` after the last look."""
        for path in self._folder.glob("*.pulse"):
            if (rank := int(path.stem)) not in self._files:
                with contextlib.suppress(OSError):  # it is just being taken away
                    self._files[rank] = self._opened(path), self._opened(path.with_suffix(".stacks"))
        for rank, (file, _) in self._files.items():
            pulse = Pulse.of(rank, os.pread(file, PULSE_BYTES, 0))
            before = self._watched.get(rank)
            if before is None or (before.pulse.pid, before.pulse.beats) != (pulse.pid, pulse.beats):
                self._watched[pulse.rank] = _Watched(pulse)
            else:
                before.quiet_s += passed_s
        furthest = max((each.pulse.progress for each in self._watched.values()), default=0)
        quiet = [each for each in self._watched.values() if each.quiet_s > self._limits.patience_s]
        late = [self._judge(each, furthest) for each in sorted(quiet, key=lambda each: each.pulse.progress)]
        return [each for each in late if each is not None]

    def look_at_launcher(self, pid: int, passed_s: float) -> str | None:
        """Why to end torchrun, process `pid`, which has no rank left that lives and does not end by itself; or None."""
        stopped = _state_of(pid) in "Tt"
        ranks_to_come = not self._watched and not stopped
        if ranks_to_come or any(_state_of(each.pulse.pid) not in "ZX" for each in self._watched.values()):
            self._alone_s = 0.0
            return None
        self._alone_s += passed_s
        if self._alone_s <= (self._limits.patience_s if stopped else _EXIT_BARRIER_S):
            return None
        is_in = "is stopped" if stopped else "does not end"
        return f"process {pid} on {socket.gethostname()}, which is over the ranks, {is_in}, and none of them lives"

    def _opened(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.callback(os.close, descriptor)
        return descriptor

    def print_stacks(self) -> None:
        """Where the threads of the node's ranks and of their readers stand."""
        pulses = [each.pulse for each in self._watched.values()]
        for pulse in pulses:
            for process in _family(pulse.pid):
                if process.pid == pulse.pid or _is_reader(process):
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(STACKS)
        time.sleep(_PRINTING_S)
        for pulse in pulses:
            stacks = os.pread(self._files[pulse.rank][1], _MOST_STACKS, 0).decode("utf-8", "replace").rstrip()
            to_stderr(f"rank {pulse.rank}: {'' if stacks else 'prints no stacks: it is stopped, or the kernel has it'}")
            for line in stacks.splitlines():
                to_stderr(line)

    def end_ranks(self) -> None:
        """Kill them and their helpers: whoever hangs heeds no other signal, and the others wait for it."""
        for each in self._watched.values():
            for process in reversed(_family(each.pulse.pid)):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def _judge(self, watched: _Watched, furthest: int) -> Late | None:
        pulse, quiet_s = watched.pulse, watched.quiet_s
        family = _family(pulse.pid)
        if not family or _state_of(family[0].pid) in "ZX":  # a dead one is torchrun's to tell
            return None
        halted = [process for process in family if _state_of(process.pid) in "Tt"]
        limit = self._limits.of_phase(pulse.phase, pulse.progress < furthest)
        hangs = bool(halted) or (limit is not None and quiet_s > limit)
        # A rank alone knows what its storage may take, but the user may want to know why nothing goes on.
        tells = pulse.phase == "data" and not watched.told
        if not hangs and not tells:
            return None
        # The writer of a checkpoint may work for long beside a rank that hangs for another reason.
        at = [process for process in family if process.pid == pulse.pid or _is_reader(process) or process in halted]
        states = listed([f"{_name(process, pulse.pid)} {_in_words(process)}" for process in at], limit=4)
        line = (
            f"rank {pulse.rank} on {socket.gethostname()} has given no sign of life for {quiet_s:.0f} s: in "
            f"{pulse.phase!r} after step {pulse.step}; {states}"
        )
        if hangs:
            return Late(pulse, line)
        watched.told = True
        to_stderr(f"{line}; it is waited for: data.patience_s={self._limits.data_s:g}")
        return None


def watch(process: subprocess.Popen[bytes], pulses: Path, config: RunConfig, folder: RunFolder) -> int:
    """Wait for the ranks of a node, or torchrun over them; the exit code, STOPPED where they were ended since one hung.

    pulses: the folder that their heartbeats are in.
    """
    poll_s = min(_POLL_S, config.parallel.hang_s / 4)
    with Watchdog(pulses, Limits.of(config)) as dog:
        looked = time.monotonic()
        while True:
            try:
                return process.wait(poll_s)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                passed_s, looked = min(now - looked, 2 * poll_s), now
            if late := dog.look(passed_s):
                _print(dog, late)
                # The one that is least far first: what it hangs in, the others may wait for.
                _say(folder, late[0].pulse.step, late[0].line)
                dog.end_ranks()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LEAVING_S)
                return _end(process)
            if line := dog.look_at_launcher(process.pid, passed_s):
                to_stderr(line)
                _say(folder, None, line)
                return _end(process)


def _print(dog: Watchdog, late: list[Late]) -> None:
    try:
        dog.print_stacks()
    except Exception as error:  # whatever it is, the ranks are to be ended
        to_stderr(f"the stacks cannot be printed: {error}")
    for each in late:
        to_stderr(each.line)


def _say(folder: RunFolder, step: int | None, line: str) -> None:
    """In exit.json, by a thread, since the folder may lie on what hangs."""
    saying = threading.Thread(target=folder.write_exit, args=(STOPPED, step, line), daemon=True)
    saying.start()
    saying.join(_SAYING_S)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill it and what is below it; STOPPED. One that the kernel has may stay behind, dead once it is let go."""
    for each in reversed(_family(process.pid)):
        with contextlib.suppress(psutil.Error):
            each.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LEAVING_S)
    return STOPPED


def _family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _is_reader(process: psutil.Process) -> bool:
    try:
        return "vitscale.data.reader" in process.cmdline()
    except psutil.Error:
        return False


def _name(process: psutil.Process, rank_pid: int) -> str:
    what = "its process" if process.pid == rank_pid else "its reader" if _is_reader(process) else "its helper"
    return f"{what} {process.pid}"


def _state_of(pid: int) -> str:
    """As /proc has it: R, S, D (the kernel has it, mostly for a file system), T (stopped), Z (dead)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
    return "Z"


def _in_words(process: psutil.Process) -> str:
    state = _state_of(process.pid)
    if state in "Tt":
        return f"is stopped (by a signal: kill -CONT {process.pid} lets it go on)"
    waits = ""
    with contextlib.suppress(OSError):
        waits = Path(f"/proc/{process.pid}/wchan").read_text("ascii").strip("0\n")
    return f"is in state {state}{' in ' if waits else ''}{waits}"
