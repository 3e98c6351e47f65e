"""How long a run takes from its command to the end of its first step, by part, when it is new and when it goes on."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitscale.bench.photographs import photograph_shards
from vitscale.run_folder import RunFolder
from vitscale.world import child_environment

NEW, RESUMED = "a new run", "from a checkpoint"
LAUNCHER, ALL = "launcher", "all"
_IMAGES = 64
_CONFIG = """\
run: {{dir: {folder}}}
model: {{preset: {preset}}}
objective: {{name: mae}}
data: {{train: ["{folder}/shards/*.tar"], lanes: 2, window: 32}}
train: {{global_batch: {batch}, micro_batch: 2, steps: 1, compile: {compiled}}}
parallel: {{zero_stage: 2}}
tracking: {{mlflow: false}}
"""


def measure(
    preset: str, ranks: int, rounds: int, folder: Path, compiled: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each part by kind of start, one a round: the run's own parts, `launcher` (what comes before the ranks'
    processes) and `all`, from the command to the line that tells of the first step.

    A MAE of `preset` at ZeRO-2, from JPEGs, by launch/torchrun.sh's module; each round a new run of one step, then the
    same run for a second step. compiled: with train.compile, and torch's cache on disk empty for every start, as on
    another node: the new run compiles all, the other has what that kept in its folder.
    """
    photograph_shards(folder / "shards", _IMAGES, distinct=16)
    config = folder / "config.yaml"
    config.write_text(
        _CONFIG.format(folder=folder, preset=preset, batch=2 * ranks, compiled=str(compiled).lower()), encoding="utf-8"
    )
    result: dict[str, dict[str, list[float]]] = {NEW: {}, RESUMED: {}}
    for number in range(rounds):
        name = f"run{number}"
        for steps, kind in enumerate((NEW, RESUMED), start=1):
            keys = (f"run.name={name}", f"train.steps={steps}")
            seconds = _start(config, ranks, RunFolder.at(str(folder), name), folder / f"cache-{name}-{steps}", *keys)
            for part, each in seconds.items():
                result[kind].setdefault(part, []).append(each)
    return result


def table(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> list[list[str]]:
    """The median of each part, a row a kind of start, empty where that has no such part."""
    parts = [part for part in dict.fromkeys(part for each in seconds.values() for part in each) if part != ALL] + [ALL]
    rows = [["seconds to the end of the first step", *parts]]
    for kind, of_parts in seconds.items():
        rows.append([kind, *(f"{statistics.median(of_parts[part]):.1f}" if part in of_parts else "" for part in parts)])
    return rows


def _start(config: Path, ranks: int, run: RunFolder, cache: Path, *overrides: str) -> dict[str, float]:
    """One start to its end, torch's compiler with its `cache`; RuntimeError with what it printed if it failed."""
    command = [sys.executable, "-m", "vitscale.launch.torchrun", "pretrain", str(config), *overrides]
    environment = child_environment() | {"NPROC_PER_NODE": str(ranks), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    began, reached, lines = time.monotonic(), 0.0, []
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("start-up: "):
                reached = time.monotonic() - began
    if process.returncode or not reached:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {''.join(lines[-5:])}")
    parts: dict[str, float] = json.loads(run.summary.read_text(encoding="utf-8"))["startup_seconds"]
    return {LAUNCHER: reached - sum(parts.values()), **parts, ALL: reached}
