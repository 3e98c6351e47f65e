"""`launch/torchrun.sh pretrain CONFIG.yaml [dotted.key=value ...]`: a run on one node's ranks or several nodes'.

From the environment: NPROC_PER_NODE ranks a node (default: its GPUs, or 1); with NNODES above 1 the
same command is started on every node, with the same RDZV_ENDPOINT=HOST:PORT, where HOST is one of
the nodes and PORT is free there, and a run folder that all nodes share.

With RESTARTS=N on one node the ranks are started again in place after a fault of the infrastructure (a lost rank, a
limit of memory, storage), at most N times in a row without a new checkpoint, and each time that the run has gone back
before a spike (guard.rollback).

The exit code is the run's own, read from exit.json in its folder, since torchrun says 1 for every
failure: 0 done, 2 bad config or input, 3 stopped on request with a checkpoint, or by the infrastructure: the
same command goes on; 130 ended at once by a second Ctrl-C or TERM; 1 anything else.

`doctor CONFIG.yaml` in the place of pretrain looks at what a run needs, on all ranks: 0, or 2 if it would not start.
`evaluate RUN|MODEL [--out FOLDER] [dotted.key=value ...]` scores a run or a model on all ranks, once, whatever RESTARTS
says; the exit code is that of the rank that failed first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from vitscale.config.check import check_config
from vitscale.config.load import load_config
from vitscale.config.schema import RunConfig
from vitscale.data.handover import hand_over
from vitscale.data.index import open_index, store_of
from vitscale.errors import ConfigError, LaunchError, VitscaleError, failed_storage
from vitscale.launch import attempts
from vitscale.launch.snapshot import keep_snapshot
from vitscale.launch.watchdog import watch
from vitscale.prepare.image_folder import PACKED, pack_folder, packed_sources
from vitscale.run_folder import BAD_INPUT, DONE, INTERRUPTED, ROLLED_BACK, STOP_REASON, STOPPED, RunFolder, exit_code
from vitscale.text import redact, to_stderr
from vitscale.world import ATTEMPT, HEARTBEAT, World, child_environment, hide_secrets, local_device

_LOOK_S = 1.0  # between two looks for the stop file
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # the last: its terminal is closed


@dataclass(frozen=True)
class Layout:
    """How many ranks there are to be, and where the nodes meet."""

    nodes: int = 1
    per_node: int = 1
    endpoint: str | None = None  # HOST:PORT of the rendezvous; None on a single node
    run_id: str = "vitscale"  # tells one rendezvous at an endpoint from another
    is_host: bool | None = None  # whether this node holds the rendezvous; None: torchrun compares host names
    address: str | None = None  # this node's name as the others know it; None: torchrun asks the resolver

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def world(self) -> World:
        """The World of rank 0, for checks that come before any rank."""
        return World(world_size=self.ranks, local_world_size=self.per_node, device=local_device())

    def command(self, arguments: Sequence[str], runner: str = "torch.distributed.run") -> list[str]:
        """What to run on this node for `vitscale ARGUMENTS`; runner: the module that starts several ranks."""
        program = ["-m", "vitscale.cli", *arguments]
        if self.ranks == 1:
            return [sys.executable, *program]
        torchrun = [sys.executable, "-m", runner, f"--nproc-per-node={self.per_node}"]
        if self.nodes == 1:
            return [*torchrun, "--standalone", *program]
        # The first node may be slow to come up, so that connecting to it has the time joining has.
        settings = "join_timeout=600,read_timeout=600" + ("" if self.is_host is None else f",is_host={self.is_host}")
        torchrun += [f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}"]
        torchrun += [f"--rdzv-id={self.run_id}", f"--rdzv-conf={settings}"]
        return [*torchrun, *([f"--local-addr={self.address}"] if self.address else []), *program]

    def environment(self) -> dict[str, str]:
        """The ranks' environment: without a thread count of the user's own, the node's cores are shared out."""
        threads = World(local_world_size=self.per_node).cores_per_rank
        return {"OMP_NUM_THREADS": str(threads), **child_environment()}


def read_layout() -> Layout:
    """The Layout that NPROC_PER_NODE, NNODES and RDZV_ENDPOINT tell."""
    nodes, endpoint = whole_number("NNODES", 1), os.environ.get("RDZV_ENDPOINT")
    if nodes > 1 and not endpoint:
        raise LaunchError(f"NNODES={nodes}: needs RDZV_ENDPOINT=HOST:PORT, where HOST is one of the nodes")
    return Layout(nodes, ranks_per_node(), endpoint, os.environ.get("RDZV_ID", Layout.run_id))


def ranks_per_node() -> int:
    """NPROC_PER_NODE, or one rank for each GPU that this node shows, or 1."""
    gpus = _visible_gpus()
    ranks = whole_number("NPROC_PER_NODE", max(gpus, 1))
    if 0 < gpus < ranks:
        raise LaunchError(
            f"NPROC_PER_NODE={ranks}: this node shows {gpus} GPUs, and two ranks cannot share one; "
            "lower it, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    return ranks


def whole_number(name: str, default: int, least: int = 1) -> int:
    """A count from the environment."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise LaunchError(f"{name}={text!r} in the environment: must be a whole number of {least} or more")
    return int(text)


def _visible_gpus() -> int:
    if local_device() == "cpu":
        return 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or 1


def prepare(arguments: Sequence[str], layout: Layout, script: str, patience_s: float = 0.0) -> RunFolder:
    """Check config, world and data before there is any rank, clear what an earlier start left, keep a snapshot.

    `arguments`: `pretrain|finetune CONFIG.yaml [dotted.key=value ...]`; `script`: the launch script, for the record;
    `patience_s`: how long to wait for a folder that is in use. Shards not yet counted are counted here, however
    long that takes: ranks that wait for each other give up after parallel.timeout_s.
    """
    hide_secrets()
    config = read_config(arguments)
    if arguments[0] == "pretrain":  # finetune's keys are complete once the encoder is looked at
        check_config(config, layout.world())
    folder = RunFolder.at(config.run.dir, config.run.name)
    folder.require_free(patience_s)
    folder.clear_exit()
    folder.clear_requests()
    folder.announce()
    try:
        with _heeding_stop(folder):
            _prepare_data(config, folder, packs=arguments[0] == "finetune")
            keep_snapshot(folder, Path(arguments[1]), [script, *arguments])
    except BaseException:
        folder.withdraw()
        raise
    return folder


def _prepare_data(config: RunConfig, folder: RunFolder, packs: bool) -> None:
    """Count what is not counted yet; packs: images that are no shards become some."""
    train = config.data.train
    if packs:
        pack_folder(train, folder.path / PACKED)
        train = packed_sources(train, folder.path / PACKED)
    if train:  # without any, the run itself says what to give
        data = replace(config.data, train=train)
        index = open_index(
            train, data.index, folder.path, label=data.label_extension, image=data.image, store=store_of(data)
        )
        hand_over(index, data, folder.path)


@contextlib.contextmanager
def _heeding_stop(folder: RunFolder) -> Iterator[None]:
    """While the context lasts, the stop file is as Ctrl-C. It stays, for other nodes' launchers."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_S):
            if os.path.exists(folder.stop):
                os.kill(os.getpid(), signal.SIGINT)
                return

    looking = threading.Thread(target=look, name="stop", daemon=True)
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join(_LOOK_S)  # not for longer, where the file system hangs


def read_config(arguments: Sequence[str]) -> RunConfig:
    """The RunConfig that `pretrain|finetune CONFIG.yaml [dotted.key=value ...]` means."""
    if len(arguments) < 2 or arguments[0] not in ("pretrain", "finetune"):
        rule = "must be pretrain, finetune or doctor CONFIG.yaml [dotted.key=value ...], or evaluate RUN|MODEL"
        raise ConfigError(f"arguments {' '.join(arguments)!r}: {rule}")
    return load_config(arguments[1], arguments[2:])


def supervise(arguments: Sequence[str], layout: Layout, folder: RunFolder) -> int:
    """Run this node's ranks to their end; the exit code of this attempt, `folder.attempt`.

    TERM, INT, USR1 or HUP makes the stop file, so that a run has the time it needs to save (torchrun gives its
    ranks 30 s); a second TERM or INT kills torchrun and its ranks. For that, torchrun lives in a session of its own,
    where Ctrl-C does not reach it too, and is told when this process dies.
    """
    asked = killed = False
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked, killed
        if asked and process is not None:
            if number not in (signal.SIGUSR1, signal.SIGHUP):  # notices, which may come again
                killed = True
                _kill_tree(process.pid)
            return
        asked = True
        try:
            folder.stop.touch()
        except OSError as error:  # the folder is gone, or its storage fails
            to_stderr(f"{folder.stop}: cannot be made ({error.strerror}); the ranks get TERM")
            if process is not None:
                _tell_ranks(process.pid, layout)
        to_stderr("stopping: the run saves a checkpoint first; once more ends it at once")

    for number in _heard():
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="vitscale-") as pulses:
        environment = layout.environment() | {HEARTBEAT: pulses, ATTEMPT: folder.attempt}
        folder.announce()
        process = subprocess.Popen(
            layout.command(arguments), env=environment, start_new_session=True, preexec_fn=_before_torchrun
        )
        try:
            code = watch(process, Path(pulses), read_config(arguments), folder)
        finally:
            folder.withdraw()
    if killed:
        return INTERRUPTED
    if layout.ranks > 1:
        return attempts.ending(folder)
    return code if code >= 0 else attempts.ending(folder, patience_s=0)  # below 0: a signal's


def describe_exit(folder: RunFolder) -> str:
    """How a run ended, in a line."""
    said = folder.read_exit()
    if said is None:
        return f"{folder.path}: failed: the ranks ended before the run began (no exit.json); see above"
    code, reason = int(said["code"]), said["reason"]
    at = "" if said["step"] is None else f" at step {said['step']}"
    if code == DONE or (code == STOPPED and reason.startswith((STOP_REASON, ROLLED_BACK))):
        return f"{folder.path}: {reason}{at}"
    kind = {BAD_INPUT: "error", STOPPED: "ended by the infrastructure"}.get(code, "failed")
    return f"{folder.path}: {kind}{at}: {reason}"


def examine(arguments: Sequence[str], layout: Layout) -> int:
    """Run `vitscale doctor` on this node's ranks; DONE, or BAD_INPUT where rank 0 is here and says so."""
    failed = False
    command, environment = layout.command(arguments), layout.environment() | {ATTEMPT: "doctor"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            failed |= line.startswith("FAILED")
    return BAD_INPUT if failed or process.returncode else DONE


def evaluate(arguments: Sequence[str], layout: Layout) -> NoReturn:
    """Become this node's ranks of `vitscale evaluate`: it changes no run, so nothing comes before them or after."""
    command = layout.command(arguments, runner="vitscale.engine.elastic")
    os.execve(command[0], command, layout.environment())


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around what comes before the ranks, with nothing to save: TERM, USR1 and HUP raise KeyboardInterrupt as Ctrl-C
    does; one more signal ends the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in _heard():
            signal.signal(each, lambda *_: os._exit(INTERRUPTED))
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_ranks(pid: int, layout: Layout) -> None:
    """TERM for the ranks that `pid` is, or is over: they save and leave."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process] if layout.ranks == 1 else process.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()


def _heard() -> list[signal.Signals]:
    """The signals that stop a run, but for HUP where nohup has it ignored. (A shell has background jobs ignore INT.)"""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignored]


def _kill_tree(pid: int) -> None:
    """KILL for a process and all that it started; torchrun itself would give its ranks 30 s."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _before_torchrun() -> None:
    """In the child, before exec: TERM for it when its parent is gone, however that happened; torchrun would die of USR1
    and leave its ranks behind, so that it, and ranks that do not train yet, ignore that."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: Sequence[str]) -> int:
    """Prepare and supervise, again where RESTARTS says so; the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return DONE if arguments else BAD_INPUT
    try:
        layout, restarts = read_layout(), whole_number("RESTARTS", 0, least=0)
        if arguments[0] == "doctor":
            return examine(arguments, layout)
        if arguments[0] == "evaluate":
            evaluate(arguments, layout)
        if layout.nodes > 1 and restarts:
            raise LaunchError(f"RESTARTS={restarts}: is for one node, and NNODES={layout.nodes}; unset it")
        with interruptible():
            folder = prepare(arguments, layout, "launch/torchrun.sh")
        while True:
            folder = replace(folder, attempt=attempts.next_attempt(folder, layout.nodes))
            code = attempts.conclude(folder, supervise(arguments, layout, folder))
            if layout.ranks > 1 and code not in (DONE, INTERRUPTED):  # below what torchrun says of it
                to_stderr(f"launch/torchrun.sh: {describe_exit(folder)}")
            if code != STOPPED or folder.stop.exists() or not attempts.restarts_here(folder, restarts):
                break
            to_stderr(f"launch/torchrun.sh: starts the ranks again, RESTARTS={restarts}")
            folder.clear_exit()
        if attempts.is_last(folder):
            folder.stop.unlink(missing_ok=True)  # the run has stopped, or it came too late
        return code
    except (VitscaleError, OSError) as raised:
        error = raised if isinstance(raised, VitscaleError) else failed_storage(raised)
        if error is None:
            raise
        to_stderr(redact(f"launch/torchrun.sh: error: {error}"))
        return exit_code(error)
    except KeyboardInterrupt:
        to_stderr("launch/torchrun.sh: stopped before there were ranks")
        return STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
