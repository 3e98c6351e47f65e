"""What `vitscale chaos` does to runs, and what must come of it: the kinds of faults."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import psutil

from vitscale.launch.trials import RANKS, SAVED_EVERY, STEPS, Start, TrialFailed, kill, newest_checkpoint
from vitscale.run_folder import BAD_INPUT, DONE, INTERRUPTED, ROLLED_BACK, STOP_REASON, STOPPED, RunFolder

KILLED = -9
_BATCHES = 2  # micro-batches of a step on a rank
_BAD_STEPS = 3  # in a row: train.max_skipped_steps of a trial, and as many as a spike must last
_WRITING = (
    "state_begun",
    "state_synced",
    "manifest_written",
    "manifest_synced",
)  # points of a save, as files are written
_SAVE_FAILED = "training goes on, and the next save is tried as usual"
_KILLING = (*_WRITING, "agreed", "renamed", "retiring")


@dataclass(frozen=True)
class Kind:
    """A fault and what must come of it. `breaks` may also say in `start.expected` what exit.json must tell."""

    breaks: Callable[[Start, Random], float]  # waits for its moment, does it; when, by the monotonic clock
    codes: tuple[int, ...] = (STOPPED,)  # that a broken start may end with; DONE: the run goes on through it
    faults: int = 1  # in a trial
    point: Callable[[Random], str] = lambda draw: ""  # for VITSCALE_FAULT
    after: Callable[[RunFolder, Random], None] = lambda run, draw: None  # what is done before the next start
    ranks: Callable[[Random], int] = lambda draw: RANKS  # of a start
    loses: bool = True  # steps, to the last checkpoint at most
    at_once: bool = False  # the start ends in a moment
    told: str = ""  # words of what the run prints, by which the fault is known to have come
    tracked: bool = False  # by a real MLflow server: `start.server`
    anywhere: bool = False  # also while a run starts: whoever calls `breaks` waits for the moment


def moment(start: Start, draw: Random) -> None:
    """Wait for a random moment in training."""
    step = min(start.step() + draw.randint(1, SAVED_EVERY + 3), STEPS - SAVED_EVERY)
    start.until(lambda: start.step() >= step, f"step {step}")
    time.sleep(draw.uniform(0, 0.05))


# ---- processes that die, hang, or are asked


def _kill_one(start: Start, draw: Random) -> float:
    start.until(lambda: bool(start.members()), "the ranks")
    draw.choice(start.members()).kill()
    return time.monotonic()


def _kill_all(start: Start, draw: Random) -> float:
    kill(start.left())
    return time.monotonic()


def _kill_behind_two(start: Start, draw: Random) -> float:
    """All, once there are two checkpoints: the newest is to be damaged."""
    start.until(lambda: len(list(start.run.checkpoints.glob("step_*"))) >= 2, "two checkpoints")
    moment(start, draw)
    return _kill_all(start, draw)


def _await_death(start: Start, draw: Random) -> float:
    """Of the rank that VITSCALE_FAULT kills."""
    start.until(lambda: len(start.members()) == RANKS, "the ranks")
    start.until(lambda: len(start.members()) < RANKS, "the fault")
    return time.monotonic()


def _ask_to_stop(start: Start, draw: Random) -> float:
    moment(start, draw)
    rank = draw.choice(start.members())
    ways: list[Callable[[], object]] = [
        start.process.terminate,
        lambda: start.process.send_signal(signal.SIGINT),
        lambda: start.process.send_signal(signal.SIGUSR1),
        rank.terminate,
        lambda: rank.send_signal(signal.SIGUSR1),
        start.run.stop.touch,
    ]
    draw.choice(ways)()
    start.expected = [STOP_REASON]
    return time.monotonic()


def _ask_twice(start: Start, draw: Random) -> float:
    """TERM or Ctrl-C to the launcher, and again while the run saves."""
    moment(start, draw)
    number = draw.choice((signal.SIGTERM, signal.SIGINT))
    start.process.send_signal(number)
    start.until(start.run.stop.exists, "the stop file")  # the launcher has heard it
    time.sleep(draw.uniform(0, 0.3))
    start.process.send_signal(number)
    return time.monotonic()


def _ask_to_save(start: Start, draw: Random) -> float:
    """As `vitscale save` does; the checkpoint must be there when the run has taken the request away."""
    moment(start, draw)
    step, asked = start.step(), time.monotonic()
    start.run.save.touch()
    start.until(lambda: not start.run.save.exists() and newest_checkpoint(start.run) >= step, "the checkpoint")
    return asked


def _stop(module: str) -> Callable[[Start, Random], float]:
    """SIGSTOP to the rank, or to its process of another module."""

    def stop(start: Start, draw: Random) -> float:
        moment(start, draw)
        rank = draw.randrange(RANKS)
        start.members(module)[rank].suspend()
        return _hangs(start, rank)

    return stop


def _stop_writer(start: Start, draw: Random) -> float:
    return _hangs(start, _at_writer(start, draw, psutil.Process.suspend))


def _hangs(start: Start, rank: int) -> float:
    start.expected = [f"rank {rank} on", "is stopped (by a signal"]
    return time.monotonic()


def _kill_reader(start: Start, draw: Random) -> float:
    moment(start, draw)
    draw.choice(start.members("vitscale.data.reader")).kill()
    return time.monotonic()


def _kill_writer(start: Start, draw: Random) -> float:
    _at_writer(start, draw, psutil.Process.kill)
    return time.monotonic()


def _at_writer(start: Start, draw: Random, act: Callable[[psutil.Process], object]) -> int:
    """Do it to the process that writes a rank's file, which lives for a moment at each save; the rank."""
    moment(start, draw)
    ranks, rank = start.members(), draw.randrange(RANKS)

    def catch() -> bool:
        try:
            for child in ranks[rank].children():
                if "vitscale.checkpoint.writer" in child.cmdline():
                    act(child)
                    return child.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False  # it has ended by itself: the next one
        return False

    start.until(catch, "a save", poll_s=0.005)
    return rank


def _start_another(start: Start, draw: Random) -> float:
    """A second start of the same run, which must be refused."""
    moment(start, draw)
    with Start(start.ground, start.name) as second:
        code = second.wait()
    if code != BAD_INPUT:
        raise TrialFailed(f"the second start of a run ended with {code}, not {BAD_INPUT}")
    return time.monotonic()


def _without_mlflow(start: Start, draw: Random) -> float:
    """Its server is ended, or halted, for some steps."""
    assert start.server is not None
    moment(start, draw)
    began = time.monotonic()
    leave, come_back = draw.choice(((start.server.end, start.server.start), (start.server.halt, start.server.go_on)))
    leave()
    moment(start, draw)
    come_back()
    return began


# ---- files


def _damage(run: RunFolder, draw: Random) -> None:
    """Flip a bit of a file of the newest checkpoint, cut it, empty it or take it away."""
    newest = max(run.checkpoints.glob("step_*"))
    file = draw.choice(sorted(newest.iterdir()))
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


# ---- numbers


def _not_finite(draw: Random) -> str:
    """One rank's pixels, and so all ranks' gradients, for so long that the run goes back."""
    first, rank = draw.randint(45, 115), draw.randrange(RANKS)
    return f"point=batch action=nan rank={rank} nth={_BATCHES * first + 1} times={_BATCHES * _BAD_STEPS}"


def _spike(draw: Random) -> str:
    """All ranks' pixels, which are the targets too."""
    return f"point=batch action=scale:30 nth={_BATCHES * draw.randint(45, 115) + 1} times={_BATCHES * _BAD_STEPS}"


def _flip(draw: Random) -> str:
    """A bit of what all ranks hold: at any step one of a fixed table, or at one that is saved one of any tensor, since
    ZeRO writes the weights again at each step."""
    step, tensor = draw.randint(41, 119), 0
    if draw.random() < 0.5:
        step, tensor = SAVED_EVERY * draw.randint(2, 5), draw.randrange(1, 30)
    return f"point=step action=flip:{tensor} rank={draw.randrange(_MANY)} nth={step}"


_MANY = 4  # ranks, of which one can be told from the others


def _await_end(*expected: str) -> Callable[[Start, Random], float]:
    """Of a start that ends by the numbers that VITSCALE_FAULT spoils, and says so; when they were spoilt."""

    def wait(start: Start, draw: Random) -> float:
        keys = dict(word.split("=", 1) for word in start.fault.split())
        step = int(keys["nth"]) if keys["point"] == "step" else int(keys["nth"]) // _BATCHES + 1
        start.until(lambda: start.step() >= step, f"step {step}")
        told = [f"rank {keys['rank']} on"] if keys["point"] == "step" else []  # what is not finite comes to all
        start.expected = [*expected, *told]
        return time.monotonic()

    return wait


KINDS = {
    "rank killed": Kind(_kill_one, faults=6, anywhere=True),
    "all killed": Kind(_kill_all, (KILLED,), faults=6, anywhere=True),
    "killed in a save": Kind(_await_death, point=_in_save("kill", _KILLING)),
    "asked to stop": Kind(_ask_to_stop, faults=2, loses=False),
    "asked twice": Kind(_ask_twice, (INTERRUPTED,), faults=2, at_once=True),
    "asked to save": Kind(_ask_to_save, (DONE,)),
    "disk full in a save": Kind(
        lambda start, draw: time.monotonic(), (DONE,), point=_in_save("raise:ENOSPC", _WRITING), told=_SAVE_FAILED
    ),
    "writer killed": Kind(_kill_writer, (DONE,), told=_SAVE_FAILED),
    "writer hangs": Kind(_stop_writer),
    "checkpoint damaged": Kind(_kill_behind_two, (KILLED,), after=_damage, told="is not usable"),
    "rank hangs": Kind(_stop("vitscale.cli")),
    "reader hangs": Kind(_stop("vitscale.data.reader")),
    "reader killed": Kind(_kill_reader, (DONE,), told="is started again"),
    "other rank counts": Kind(
        _kill_all, (KILLED,), faults=3, ranks=lambda draw: draw.choice((1, 2, 4)), anywhere=True
    ),
    "started twice": Kind(_start_another, (DONE,), told="in use by"),
    "gradients not finite": Kind(_await_end(ROLLED_BACK, "the gradient was not finite"), point=_not_finite),
    "spike of the loss": Kind(_await_end(ROLLED_BACK, "the loss is"), point=_spike),
    "bit flipped": Kind(
        _await_end("not the same bits as the other ranks"), point=_flip, ranks=lambda draw: _MANY
    ),
    "MLflow down": Kind(_without_mlflow, (DONE,), tracked=True),
}  # fmt: skip
