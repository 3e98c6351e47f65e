"""`vitscale chaos`: runs are broken on purpose, one after the other, and compared with a run that was not.

Each trial is a real run of two ranks by launch/torchrun.py on shards made here, broken once or several times (see
breaking.py) at moments drawn from the seed and started again each time by the same command. It passes if it ends as the
unbroken run did: the final weights' digest, the loss of each step bit by bit (where all starts had the same ranks), the
samples of each step, no step missing or twice, only exit codes and reasons that are documented for the fault, every
checkpoint whole, no process and no draft left.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from random import Random

import psutil

from vitscale.errors import ConfigError, LaunchError
from vitscale.files.atomic import write_atomically
from vitscale.launch.breaking import KINDS, Kind, moment
from vitscale.launch.mlflow_server import MlflowServer
from vitscale.launch.torchrun import interruptible
from vitscale.launch.trials import (
    RANKS,
    STEPS,
    Ground,
    Start,
    TrialFailed,
    differences,
    half_written,
    newest_checkpoint,
)
from vitscale.run_folder import DONE, FAILED, RunFolder
from vitscale.text import aligned, duration, listed
from vitscale.tracking.jsonl import JsonlFile

_STAGES = (2, 0, 3, 1)  # of the trials, in turns
_STARTING_S = 12.0  # within so long of its start a process is killed that has not begun to train
_AT_START = 0.5  # of the faults that may come at any time: a run here starts for as long as it trains
_AT_ONCE_S = 5.0
_BETWEEN_FAILURES_H, _SAVE_EVERY_MIN = 3.0, 10.0  # for the goodput


@dataclass
class Outcome:
    """What the trials of a kind came to."""

    trials: int = 0
    passed: int = 0
    faults: int = 0
    detect_s: list[float] = field(default_factory=list)  # from a fault to the end of its start
    lost_steps: list[int] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)  # from a fault to the next new step
    problems: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Take those of another trial."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass
class Trial:
    """A run that is broken as its kind says."""

    ground: Ground
    name: str
    kind: Kind
    draw: Random
    outcome: Outcome = field(default_factory=lambda: Outcome(1))
    _same_world: bool = True
    _broken: list[float] = field(default_factory=list)  # when, where no new step has come since then
    _highest: int = 0  # step so far

    def run(self) -> Outcome:
        """All of it."""
        try:
            with ExitStack() as stack:
                server = None
                if self.kind.tracked:
                    server = stack.enter_context(MlflowServer(self.ground.folder / f"{self.name}-mlflow"))
                self._start_until_done(server)
                if self.kind.told not in self.ground.log(self.name).read_text("utf-8", "replace"):
                    self._add([f"it never printed {self.kind.told!r}"])
                self._add(differences(self.ground.like(self._folder), self._folder, self._same_world))
                if server is not None:
                    self._add(server.differences(self._folder))
        except (TrialFailed, LaunchError, OSError, psutil.Error) as error:
            self._add([str(error)])
        self.outcome.passed = int(not self.outcome.problems)
        return self.outcome

    @property
    def _folder(self) -> RunFolder:
        return RunFolder.at(str(self.ground.folder), self.name)

    def _add(self, problems: Iterable[str]) -> None:
        self.outcome.problems += [f"{self.name}: {problem}" for problem in problems]

    def _start_until_done(self, server: MlflowServer | None) -> None:
        kind, draw, began = self.kind, self.draw, 0
        for fault in itertools.count(1):
            breaks, ranks = fault <= kind.faults, kind.ranks(draw)
            self._same_world &= ranks == RANKS
            with Start(self.ground, self.name, kind.point(draw) if breaks else "", ranks, server) as start:
                early = self._meddle(start, breaks)
                code = start.wait()
                ended = time.monotonic()
                self._add(f"left: process {each.pid}" for each in start.stays())
                reached = start.step()
                self._highest = max(self._highest, reached)
            self._add(half_written(self._folder))
            if code == DONE and (DONE in kind.codes or not breaks):
                return
            entered, began = self._began() > began, self._began()
            if not breaks or not (code in kind.codes or (code == FAILED and not entered)):
                raise TrialFailed(f"ended with code {code}: {start.last_lines()}")
            lost = 0 if early else reached - newest_checkpoint(self._folder)
            self._judge_end(start, ended - self._broken[-1], lost)
            kind.after(self._folder, draw)

    def _meddle(self, start: Start, breaks: bool) -> bool:
        """Wait for the first new step, and break the start; whether it was broken before that."""
        kind, draw, began = self.kind, self.draw, time.monotonic()
        early = breaks and kind.anywhere and draw.random() < _AT_START
        ends = began + draw.uniform(0, _STARTING_S) if early else float("inf")
        if self._highest < STEPS:  # else it was broken while its last checkpoint was written
            start.until(lambda: start.step() > self._highest or time.monotonic() > ends, "the next new step")
        if start.step() > self._highest:
            self.outcome.back_s += [time.monotonic() - broken for broken in self._broken]
            self._broken.clear()
        if breaks:
            if kind.anywhere and not early:
                moment(start, draw)
            self._broken.append(kind.breaks(start, draw))
            self.outcome.faults += 1
        return early

    def _judge_end(self, start: Start, seconds: float, lost: int) -> None:
        """Of a start that was broken, and ended so long after that."""
        outcome, reason = self.outcome, str((self._folder.read_exit() or {"reason": ""})["reason"])
        outcome.detect_s.append(seconds)
        outcome.lost_steps.append(lost)
        if self.kind.at_once and seconds > _AT_ONCE_S:
            self._add([f"it took {seconds:.1f} s to leave at once"])
        if lost and not self.kind.loses:
            self._add([f"{lost} steps were lost"])
        self._add(f"exit.json says {reason!r}, without {words!r}" for words in start.expected if words not in reason)

    def _began(self) -> int:
        """How many of its starts had ranks that entered the run."""
        path = self._folder.attempts
        return sum("began" in row for row in JsonlFile(path).rows()) if path.exists() else 0


def planned(kinds: Sequence[str], trials: int, kills: int = 0) -> list[tuple[str, int]]:
    """The kind and the ZeRO stage of each trial: these kinds in turns, then those that kill at any moment until there
    are so many kills."""
    turns = [divmod(number, len(kinds)) for number in range(trials)]
    plan = [(kinds[place], _STAGES[(turn + place) % len(_STAGES)]) for turn, place in turns]
    killing = [name for name in kinds if KINDS[name].anywhere and KINDS[name].faults > 1]
    stages = itertools.cycle(_STAGES)
    while killing and sum(KINDS[name].faults for name, _ in plan if KINDS[name].anywhere) < kills:
        stage = next(stages)
        plan += [(name, stage) for name in killing]
    return plan


def chaos(folder: Path, plan: Sequence[tuple[str, int]], seed: int, say: Callable[[str], None]) -> dict[str, Outcome]:
    """Run these trials in `folder`; what they came to, by kind. Ctrl-C ends it with the trials before."""
    outcomes = {name: Outcome() for name, _ in plan}
    grounds: dict[int, Ground] = {}
    try:
        for number, (name, stage) in enumerate(plan):
            if stage not in grounds:
                grounds[stage] = Ground(folder, stage)
                grounds[stage].prepare()
            run, draw = f"{number}-{name.replace(' ', '-')}", Random(f"{seed} {number} {name}")
            came_to = Trial(grounds[stage], run, KINDS[name], draw).run()
            outcomes[name].add(came_to)
            told = listed(came_to.problems) if came_to.problems else "passed"
            say(f"{number + 1} of {len(plan)}: {name}, ZeRO {stage}: {told}")
    except KeyboardInterrupt:
        say("interrupted; of the trials that have ended:")
    return outcomes


def as_table(outcomes: dict[str, Outcome]) -> str:
    """For the terminal."""
    rows = [("fault", "passed", "faults", "s to detect", "steps lost", "s to the next new step")]
    for name, each in outcomes.items():
        cells = (_spread(each.detect_s), _spread(each.lost_steps), _spread(each.back_s))
        rows.append((name, f"{each.passed} of {each.trials}", str(each.faults), *cells))
    return aligned(rows)


def goodput(outcomes: dict[str, Outcome]) -> float | None:
    """The share of time that trains, at a failure each `_BETWEEN_FAILURES_H` hours and a save each `_SAVE_EVERY_MIN`
    minutes: a failure costs what it takes to the next new step, and half of what lies between two saves."""
    back = [seconds for each in outcomes.values() for seconds in each.back_s]
    if not back:
        return None
    return 1 - (statistics.median(back) + _SAVE_EVERY_MIN * 60 / 2) / (_BETWEEN_FAILURES_H * 3600)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} (at most {max(values):.1f})" if values else ""


def run_trials(
    kinds: Sequence[str] | None,
    trials: int | None,
    kills: int,
    seed: int,
    out: Path | None = None,
    figures: Path | None = None,
) -> int:
    """The verb: print a line a trial and a table; DONE if all have passed. ConfigError for an unknown kind."""
    kinds = list(KINDS) if kinds is None else kinds
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--kinds {unknown[0]!r}: must be of {', '.join(map(repr, KINDS))}")
    plan, began = planned(kinds, len(kinds) if trials is None else trials, kills), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vitscale-chaos-") as scratch, interruptible():
        folder = (out or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = chaos(folder, plan, seed, lambda line: print(line, flush=True))
    print(as_table(outcomes))
    share = goodput(outcomes)
    if share is not None:
        print(
            f"goodput: {share:.1%} at a failure each {_BETWEEN_FAILURES_H:g} h and a save each {_SAVE_EVERY_MIN:g} min "
            "(half of what lies between two saves is lost; start-up as measured here)"
        )
    if figures is not None:
        write_atomically(figures, json.dumps({name: asdict(each) for name, each in outcomes.items()}, indent=1) + "\n")
    passed, ended = (sum(getattr(each, name) for each in outcomes.values()) for name in ("passed", "trials"))
    killed = sum(each.faults for name, each in outcomes.items() if KINDS[name].anywhere)
    left = f" ({len(plan)} were to be)" if ended < len(plan) else ""
    print(f"passed {passed} of {ended}{left} in {duration(time.monotonic() - began)}, with {killed} random kills")
    return DONE if passed == len(plan) else FAILED
