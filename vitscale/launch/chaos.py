"""`vitscale chaos`: runs are broken on purpose, one after the other, and compared with a run that was not.

Each trial is a real run of two ranks by launch/torchrun.py on shards made here, broken once or several times at moments
drawn from the seed and started again each time by the same command. It passes if it ends as the unbroken run did: the
final weights' digest, the loss of each step bit by bit (where all starts had the same ranks), the samples of each step,
no step missing or twice, only exit codes that are documented for the fault, no process and no draft left.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random

from vitscale.errors import ConfigError
from vitscale.files.atomic import write_atomically
from vitscale.launch.trials import RANKS, SAVED_EVERY, STEPS, Ground, Start, TrialFailed, differences, newest_checkpoint
from vitscale.run_folder import BAD_INPUT, DONE, FAILED, STOPPED, RunFolder
from vitscale.text import aligned, listed

_STAGES = (2, 0, 3, 1)  # of the trials, in turns
_STARTING_S = 12.0  # within so long of its start a process is killed that has not begun to train
_AT_START = 0.3  # of the faults that may come at any time
_BETWEEN_FAILURES_H, _SAVE_EVERY_MIN = 3.0, 10.0  # for the goodput
_KILLED = -9
_WRITING = (
    "state_begun",
    "state_synced",
    "manifest_written",
    "manifest_synced",
)  # points of a save, as files are written
_KILLING = (*_WRITING, "agreed", "renamed", "retiring")


@dataclass(frozen=True)
class Kind:
    """A fault and what must come of it."""

    breaks: Callable[[Start, Random], float]  # waits for its moment, does it; when, by the monotonic clock
    codes: tuple[int, ...] = (STOPPED,)  # that a broken start may end with; DONE: the run goes on through it
    faults: int = 1  # in a trial
    point: Callable[[Random], str] = lambda draw: ""  # for VITSCALE_FAULT
    after: Callable[[RunFolder, Random], None] = lambda run, draw: None  # what is done before the next start
    ranks: Callable[[Random], int] = lambda draw: RANKS  # of the next start
    loses: bool = True  # steps, to the last checkpoint at most


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


# ---- the faults


def _moment(start: Start, draw: Random, anywhere: bool = False) -> None:
    """Wait for a random moment in training, or (`anywhere`) now and then one while it starts."""
    begun, began = start.step(), time.monotonic()
    step = min(begun + draw.randint(1, SAVED_EVERY + 3), STEPS - SAVED_EVERY)
    ends = began + draw.uniform(0, _STARTING_S) if anywhere and draw.random() < _AT_START else float("inf")
    start.until(lambda: start.step() >= step or time.monotonic() > ends, f"step {step}")
    time.sleep(draw.uniform(0, 0.05))


def _kill_one(start: Start, draw: Random) -> float:
    _moment(start, draw, anywhere=True)
    ranks = start.members()
    draw.choice(ranks or [start.process]).kill()  # type: ignore[attr-defined]
    return time.monotonic()


def _kill_all(start: Start, draw: Random) -> float:
    _moment(start, draw, anywhere=True)
    for process in start.left():
        process.kill()
    return time.monotonic()


def _await_death(start: Start, draw: Random) -> float:
    """Of the rank that VITSCALE_FAULT kills."""
    start.until(lambda: len(start.members()) == RANKS, "the ranks")
    start.until(lambda: len(start.members()) < RANKS, "the fault")
    return time.monotonic()


def _ask(start: Start, draw: Random) -> float:
    _moment(start, draw)
    rank = draw.choice(start.members())
    ways: list[Callable[[], object]] = [
        start.process.terminate,
        lambda: start.process.send_signal(2),
        rank.terminate,
        start.run.stop.touch,
    ]
    draw.choice(ways)()
    return time.monotonic()


def _stop_one(start: Start, draw: Random) -> float:
    _moment(start, draw)
    draw.choice(start.members()).suspend()
    return time.monotonic()


def _stop_reader(start: Start, draw: Random) -> float:
    _moment(start, draw)
    draw.choice(start.members("vitscale.data.reader")).suspend()
    return time.monotonic()


def _kill_reader(start: Start, draw: Random) -> float:
    _moment(start, draw)
    draw.choice(start.members("vitscale.data.reader")).kill()
    return time.monotonic()


def _start_another(start: Start, draw: Random) -> float:
    """A second start of the same run, which must be refused."""
    _moment(start, draw)
    with Start(start.ground, start.name) as second:
        code = second.wait()
    if code != BAD_INPUT:
        raise TrialFailed(f"the second start of a run ended with {code}, not {BAD_INPUT}")
    return time.monotonic()


def _damage(run: RunFolder, draw: Random) -> None:
    """Flip a bit of a file of the newest checkpoint, cut it, empty it or take it away."""
    folders = sorted(run.checkpoints.glob("step_*"))
    if len(folders) < 2:
        return
    file = draw.choice(sorted(folders[-1].iterdir()))
    content = bytearray(file.read_bytes())
    way = draw.choice(("flip", "cut", "empty", "remove"))
    if way == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    elif way == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif way == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


def _in_save(action: str, points: Sequence[str]) -> Callable[[Random], str]:
    def point(draw: Random) -> str:
        name = draw.choice(points)
        rank = draw.randrange(RANKS) if name.startswith("state") else 0
        return f"point=save.{name} action={action} rank={rank} nth={draw.randint(1, 2)}"

    return point


KINDS = {
    "rank killed": Kind(_kill_one, faults=3),
    "all killed": Kind(_kill_all, (_KILLED,), faults=3),
    "killed in a save": Kind(_await_death, point=_in_save("kill", _KILLING)),
    "asked to stop": Kind(_ask, faults=2, loses=False),
    "disk full in a save": Kind(
        lambda start, draw: time.monotonic(), (DONE,), point=_in_save("raise:ENOSPC", _WRITING)
    ),
    "checkpoint damaged": Kind(_kill_all, (_KILLED,), after=_damage),
    "rank hangs": Kind(_stop_one),
    "reader hangs": Kind(_stop_reader),
    "reader killed": Kind(_kill_reader, (DONE,)),
    "other rank counts": Kind(_kill_all, (_KILLED,), faults=3, ranks=lambda draw: draw.choice((1, 2, 4))),
    "started twice": Kind(_start_another, (DONE,)),
}


# ---- trials


def _trial(ground: Ground, name: str, kind: Kind, draw: Random, outcome: Outcome) -> list[str]:
    """What went wrong in a trial."""
    run, problems = RunFolder.at(str(ground.folder), name), []
    same_world, ranks, broken_at, highest = True, RANKS, 0.0, 0
    for fault in itertools.count(1):
        breaks = fault <= kind.faults
        with Start(ground, name, kind.point(draw) if breaks else "", ranks) as start:
            if broken_at:
                start.until(partial(_is_beyond, start, highest), "the next new step")
                outcome.back_s.append(time.monotonic() - broken_at)
            if breaks:
                broken_at = kind.breaks(start, draw)
                outcome.faults += 1
            code = start.wait()
            problems += [f"left: process {each.pid}" for each in start.stays()]
            highest = start.step()
        if code == DONE and (DONE in kind.codes or not breaks):
            break
        if not breaks or code not in kind.codes:
            return [*problems, f"ended with code {code}: {start.last_lines()}"]
        outcome.detect_s.append(time.monotonic() - broken_at)
        outcome.lost_steps.append(highest - newest_checkpoint(run))
        if not kind.loses and outcome.lost_steps[-1]:
            problems.append(f"{outcome.lost_steps[-1]} steps were lost")
        kind.after(run, draw)
        ranks = kind.ranks(draw)
        same_world = same_world and ranks == RANKS
    return problems + differences(ground, run, same_world)


def _is_beyond(start: Start, step: int) -> bool:
    return start.step() > step


def chaos(folder: Path, kinds: Sequence[str], trials: int, seed: int, say: Callable[[str], None]) -> dict[str, Outcome]:
    """Run trials of these kinds in turns, in `folder`; what they came to, by kind."""
    outcomes = {name: Outcome() for name in kinds}
    grounds = {stage: Ground(folder, stage) for stage in _STAGES}
    ready: set[int] = set()
    for number in range(trials):
        name, stage = kinds[number % len(kinds)], _STAGES[number // len(kinds) % len(_STAGES)]
        if stage not in ready:
            grounds[stage].prepare()
            ready.add(stage)
        outcome, run = outcomes[name], f"{number}-{name.replace(' ', '-')}"
        outcome.trials += 1
        try:
            problems = _trial(grounds[stage], run, KINDS[name], Random(f"{seed} {number} {name}"), outcome)
        except TrialFailed as error:
            problems = [str(error)]
        outcome.passed += not problems
        outcome.problems += [f"{run}: {problem}" for problem in problems]
        say(f"{number + 1} of {trials}: {name}, ZeRO {stage}: {'passed' if not problems else listed(problems)}")
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
    kinds: Sequence[str] | None, trials: int | None, seed: int, out: Path | None = None, figures: Path | None = None
) -> int:
    """The verb: print a line a trial and a table; DONE if all have passed. ConfigError for an unknown kind."""
    kinds = list(KINDS) if kinds is None else kinds
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--kinds {unknown[0]!r}: must be of {', '.join(map(repr, KINDS))}")
    count = len(kinds) if trials is None else trials
    with tempfile.TemporaryDirectory(prefix="vitscale-chaos-") as scratch:
        folder = (out or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = chaos(folder, kinds, count, seed, lambda line: print(line, flush=True))
    print(as_table(outcomes))
    share = goodput(outcomes)
    if share is not None:
        print(
            f"goodput: {share:.1%} at a failure each {_BETWEEN_FAILURES_H:g} h and a save each {_SAVE_EVERY_MIN:g} min "
            "(half of what lies between two saves is lost; start-up as measured here)"
        )
    if figures is not None:
        write_atomically(figures, json.dumps({name: asdict(each) for name, each in outcomes.items()}, indent=1) + "\n")
    passed = sum(each.passed for each in outcomes.values())
    print(f"passed {passed} of {count}")
    return DONE if passed == count else FAILED
