"""Starting worlds of ranks in tests, and reading what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

ROOT = Path(__file__).resolve().parents[2]

T = TypeVar("T")


@dataclass
class World:
    """A world that was started."""

    zygote: subprocess.Popen[str]
    pids: list[int]
    log: Path

    def wait(self) -> list[int]:
        """Exit codes by rank."""
        assert self.zygote.stdout is not None
        return json.loads(self.zygote.stdout.readline())["codes"]

    def output(self) -> str:
        """What all ranks printed."""
        return "".join(path.read_text() for path in sorted(self.log.parent.glob(f"{self.log.name}.*")))


@dataclass
class Launcher:
    """Starts worlds from one zygote."""

    folder: Path
    process: subprocess.Popen[str] = field(init=False)
    started: int = 0

    def __post_init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline())["ready"]

    def start(self, argv: Sequence[str], ranks: int, kill: dict[str, Any] | None = None) -> World:
        """Start `vitscale ARGV` on so many ranks; `kill`: {"rank", "point", "nth"} of a save (see zygote.py)."""
        return self.request(ranks, argv=list(argv), kill=kill)

    def call(self, function: Callable[..., T], ranks: int = 1, **arguments: Any) -> list[T]:
        """What a function of a module returns on every rank, by rank; arguments and results are JSON-able.

        The ranks are as torchrun would start them; what it needs of a process group the function makes.
        """
        named = {"module": function.__module__, "function": function.__name__, "arguments": arguments}
        results = self.folder / f"result-{self.started + 1:03d}"
        world = self.request(ranks, call=named, results=str(results))
        codes = world.wait()
        assert codes == [0] * ranks, f"exit codes {codes}\n{world.output()}"
        return [json.loads(Path(f"{results}.{rank}").read_text()) for rank in range(ranks)]

    def request(self, ranks: int, **what: Any) -> World:
        """Start a world; `what` else its ranks are told stands in zygote.py."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.started += 1
        log = self.folder / f"world-{self.started:03d}.log"
        self.process.stdin.write(json.dumps({"ranks": ranks, "log": str(log), **what}) + "\n")
        self.process.stdin.flush()
        return World(self.process, json.loads(self.process.stdout.readline())["pids"], log)

    def run(self, argv: Sequence[str], ranks: int = 1, code: int = 0, kill: dict[str, Any] | None = None) -> str:
        """Start, wait, expect every rank's exit code; what they printed."""
        world = self.start(argv, ranks, kill)
        codes = world.wait()
        assert codes == [code] * ranks, f"exit codes {codes}\n{world.output()}"
        return world.output()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a JSONL file of a run."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; a step that stands twice is an error."""
    result: dict[int, float] = {}
    for row in rows(run):
        assert row["step"] not in result, f"step {row['step']} stands twice in {run}"
        result[row["step"]] = row["loss"]
    return result


def trace(run: Path) -> dict[int, list[str]]:
    """Sample keys by step."""
    return {row["step"]: row["sample_keys"] for row in rows(run, "trace.jsonl")}


def weights(run: Path) -> dict[str, np.ndarray]:
    """The newest checkpoint's parameters, whole."""
    from vitscale.checkpoint.store import SoleRank, open_newest

    checkpoint = open_newest(run / "checkpoints", SoleRank(), print)
    assert checkpoint is not None
    return {name: checkpoint.whole(kind, name) for kind, name in checkpoint.tensors if kind == "param"}
