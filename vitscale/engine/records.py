"""What rank 0 records of a run in training: JSONL files, MLflow, the progress line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitscale.config.schema import RunConfig
from vitscale.run_folder import RunFolder
from vitscale.tracking.jsonl import JsonlFile
from vitscale.tracking.progress import Progress
from vitscale.tracking.tracker import Tracker
from vitscale.world import World

# Cut back to the checkpoint's step when a run goes on from it.
FILES = ("metrics.jsonl", "trace.jsonl", "quarantine.jsonl", "skipped.jsonl", "evaluation.jsonl")


class Records:
    """A context from the start of training to the run's end; silent on every rank but 0.

    `status` goes to MLflow at its end: FINISHED, KILLED (stopped on request) or FAILED.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        world: World,
        total_steps: int,
        step: int,
        logged: int,
        tags: Mapping[str, str],
    ) -> None:
        """`step`: where the run stands, to which its files are cut back, metrics.jsonl to `logged`; `tags`: for MLflow,
        empty ones left out."""
        self.status = "FAILED"
        self._main = world.is_main
        if not self._main:
            return
        self._files = {name: JsonlFile(folder.path / name) for name in FILES}
        for name, file in self._files.items():
            file.cut_back(logged if name == "metrics.jsonl" else step)
        self._progress = Progress(total_steps, config.train.global_batch)
        present = {name: value for name, value in tags.items() if value}
        self._tracker = Tracker(folder.path, config, present, self._progress.say)

    def __enter__(self) -> Records:
        if self._main:
            self._tracker.start()
        return self

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        if self._main:
            self.record("metrics.jsonl", row)
            self._progress.show(row)
            self._tracker.notice()

    def record(self, file: str, row: dict[str, Any]) -> None:
        """A row of any of FILES."""
        if self._main:
            self._files[file].append(row)

    def say(self, line: str) -> None:
        """A line on the terminal."""
        if self._main:
            self._progress.say(line)

    def sync(self) -> None:
        """Hand all rows to the disk."""
        if self._main:
            for file in self._files.values():
                file.sync()

    def __exit__(self, *_: object) -> None:
        if self._main:
            self._progress.close()
            self._tracker.finish(self.status)
