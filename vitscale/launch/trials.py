"""A trial of `vitscale chaos`: a run is started, watched, started again, and compared with an unbroken one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from vitscale.checkpoint.store import checkpoint_folders, faults_of
from vitscale.errors import VitscaleError
from vitscale.launch.mlflow_server import MlflowServer
from vitscale.prepare.digits import write_digits
from vitscale.run_folder import RunFolder
from vitscale.tracking.jsonl import JsonlFile

STEPS, SAVED_EVERY, RANKS = 160, 20, 2
_OF_THE_SHELL = ("NNODES", "RDZV_", "RESTARTS", "SLURM_", "VITSCALE_FAULT")
_MARK = "VITSCALE_CHAOS"  # in the environment of all that a start starts
_POLL_S = 0.05
_PATIENCE_S = 170.0  # for anything that a trial waits for
_LEAVING_S = 5.0
_ALMOST = 1e-5  # relative, of losses of other rank counts
_CONFIG = """\
run: {{dir: {folder}}}
model: {{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128, image_size: 16,
         patch_size: 4, drop_path_rate: 0.1}}
objective:
  mae: {{decoder_hidden_size: 32, decoder_num_hidden_layers: 1, decoder_num_attention_heads: 2,
         decoder_intermediate_size: 64, norm_pix_loss: false}}
data: {{train: ["{shards}"], lanes: 4, window: 64, threads: 1}}
optimizer: {{lr: 1.0e-3, lr_batch: null, warmup: 0.1}}
train: {{global_batch: 64, micro_batch: 16, steps: {steps}, max_skipped_steps: 3}}
parallel: {{zero_stage: {stage}, timeout_s: 60, patience_s: 10, restarts_without_progress: 50}}
guard: {{rollback: true, rollback_steps: {every}}}
checkpoint: {{every_steps: {every}, keep: 2}}
tracking: {{mlflow: false}}
log: {{every_steps: 1, trace: true}}
"""


class TrialFailed(VitscaleError):
    """What a trial waited for did not come."""


@dataclass(frozen=True)
class Ground:
    """What trials of one ZeRO stage share: shards, a config, and the unbroken run."""

    folder: Path
    stage: int

    @property
    def config(self) -> Path:
        return self.folder / f"stage{self.stage}.yaml"

    @property
    def unbroken(self) -> RunFolder:
        return RunFolder.at(str(self.folder), f"unbroken{self.stage}")

    def log(self, name: str) -> Path:
        """What all starts of a run have printed."""
        return self.folder / f"{name}.log"

    def prepare(self) -> None:
        """Make shards and config, and run the run that no trial meddles with."""
        write_digits(self.folder / "digits")
        shards = self.folder / "digits" / "train" / "*.tar"
        text = _CONFIG.format(folder=self.folder, shards=shards, steps=STEPS, every=SAVED_EVERY, stage=self.stage)
        self.config.write_text(text, encoding="utf-8")
        self._run(self.unbroken)

    def like(self, run: RunFolder) -> RunFolder:
        """The run to which `run` is to come out equal: the unbroken one, or where it has gone back before batches and
        left them out, one that never saw them."""
        if not run.rollbacks():
            return self.unbroken
        never = RunFolder.at(str(self.folder), f"{run.path.name}-unbroken")
        never.path.mkdir()
        shutil.copy(run.rollback_record, never.path)
        self._run(never)
        return never

    def _run(self, run: RunFolder) -> None:
        with Start(self, run.path.name) as start:
            if start.wait() != 0:
                raise TrialFailed(f"the unbroken run failed: {start.last_lines()}")


@dataclass
class Start:
    """One start of a run by launch/torchrun.py; a context at whose end nothing of it is left."""

    ground: Ground
    name: str
    fault: str = ""  # for VITSCALE_FAULT
    ranks: int = RANKS
    server: MlflowServer | None = None  # that it sends its metrics to
    expected: list[str] = field(default_factory=list)  # words of its exit.json, by whoever breaks it
    _mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> Start:
        # Of the shell's own what would change the trial: other layouts, GPUs, restarts.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_SHELL)}
        environment |= {
            "CUDA_VISIBLE_DEVICES": "",
            "NPROC_PER_NODE": str(self.ranks),
            "OMP_NUM_THREADS": "1",
            _MARK: self._mark,
        }
        environment |= {"VITSCALE_FAULT": self.fault} if self.fault else {}
        self.run = RunFolder.at(str(self.ground.folder), self.name)
        self._log = self.ground.log(self.name)
        command = [sys.executable, "-m", "vitscale.launch.torchrun", "pretrain", str(self.ground.config)]
        command += [f"run.name={self.name}"]
        if self.server is not None:
            command += ["tracking.mlflow=true", f"tracking.mlflow_uri={self.server.uri}", "tracking.log_model=false"]
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.left())
        self.process.kill()
        self.process.wait()

    def left(self) -> list[psutil.Process]:
        """All that came of this start and lives."""
        return [process for process in psutil.process_iter() if _environment(process).get(_MARK) == self._mark]

    def stays(self) -> list[psutil.Process]:
        """What of it lives some seconds after its launcher has ended."""
        ends = time.monotonic() + _LEAVING_S
        while (left := self.left()) and time.monotonic() < ends:
            time.sleep(_POLL_S)
        return left

    def members(self, module: str = "vitscale.cli") -> list[psutil.Process]:
        """The ranks, or the processes of another module that they have started, by rank."""
        wanted = [(rank_of(process), process) for process in self.left() if _module(_words(process)) == module]
        return [process for _, process in sorted(wanted, key=lambda each: each[0])]

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        rows = JsonlFile(self.run.metrics).rows()
        return int(rows[-1]["step"]) if rows else 0

    def until(self, condition: Callable[[], bool], what: str, poll_s: float = _POLL_S) -> None:
        """Wait for it; TrialFailed where it does not come, or the start ends before."""
        ends = time.monotonic() + _PATIENCE_S
        while not condition():
            if time.monotonic() > ends or self.process.poll() is not None:
                raise TrialFailed(f"{what} did not come: {self.last_lines()}")
            time.sleep(poll_s)

    def wait(self) -> int:
        """Its exit code. TrialFailed where it does not end."""
        try:
            return self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise TrialFailed(f"it did not end: {self.last_lines()}") from None

    def last_lines(self) -> str:
        return " | ".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])


def differences(unbroken: RunFolder, run: RunFolder, same_world: bool) -> list[str]:
    """How a run that was meddled with differs from one that was not; nothing, if all is well."""
    found = []
    mine, theirs = (JsonlFile(each.metrics).rows() for each in (run, unbroken))
    if [row["step"] for row in mine] != list(range(1, STEPS + 1)):
        found.append("steps are missing or twice in metrics.jsonl")
    apart = [row["step"] for row, other in zip(mine, theirs, strict=False) if not _alike(row, other, same_world)]
    if apart:
        found.append(f"the loss differs from step {apart[0]} on")
    if _samples(run) != _samples(unbroken):
        found.append("other samples were trained on (trace.jsonl)")
    if same_world and _digest(run) != _digest(unbroken):
        found.append("the final weights differ")
    drafts = [path.name for path in run.checkpoints.iterdir() if path.name.startswith(".")]
    return found + [f"left in checkpoints: {name}" for name in drafts]


def half_written(run: RunFolder) -> list[str]:
    """What is wrong with checkpoints that are there by their names."""
    return [fault for folder in checkpoint_folders(run.checkpoints) for fault in faults_of(folder)]


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL for those that have not ended meanwhile, as some do with the first."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def newest_checkpoint(run: RunFolder) -> int:
    """Its step, by its name; 0 where there is none."""
    return max((int(path.name[5:]) for path in run.checkpoints.glob("step_*")), default=0)


def _alike(row: Mapping[str, Any], other: Mapping[str, Any], same_world: bool) -> bool:
    loss, expected = float(row["loss"]), float(other["loss"])
    return loss == expected if same_world else abs(loss - expected) <= _ALMOST * abs(expected)


def _samples(run: RunFolder) -> list[Any]:
    return [json.loads(line)["sample_keys"] for line in (run.path / "trace.jsonl").read_text("utf-8").splitlines()]


def _digest(run: RunFolder) -> str:
    return hashlib.sha256((run.model / "model.safetensors").read_bytes()).hexdigest()


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except psutil.Error:
        return {}


def rank_of(process: psutil.Process) -> int:
    """Its own, or that of the process which started it: a helper has none of the launcher's variables."""
    try:
        parent = process.parent()
    except psutil.Error:
        parent = None
    variables = [_environment(each) for each in (process, parent) if each is not None]
    return next((int(each["RANK"]) for each in variables if "RANK" in each), 0)


def _module(words: Sequence[str]) -> str:
    """What `python -m` runs."""
    return words[words.index("-m") + 1] if "-m" in words[:-1] else ""


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
