"""Runs the stages of the GPU suite, each in processes of its own, within their limits and the budget."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vitscale.bench.gpu_suite.cases import Setting, Stage, serve, start_process
from vitscale.bench.gpu_suite.results import Results

_POLL_S = 0.1


class Runner:
    """One call of the suite."""

    def __init__(
        self, results: Results, device: str, scratch: Path, budget_s: float, images: Path | None = None
    ) -> None:
        self.results, self.device, self.scratch, self.images = results, device, scratch, images
        self._budget_s, self._ends = budget_s, time.monotonic() + budget_s

    def run(self, letters: Iterable[str]) -> None:
        """Run what is left of these stages, in order of worth; the results are written as they come."""
        stages = [stage.of_budget(self._budget_s) for stage in self.results.in_order(letters)]
        for stage in stages:
            record = self.results.stage(stage.letter)
            budget = self._ends - time.monotonic()
            if budget < stage.least_s:
                record["left"] = f"{max(budget, 0):.0f} s of the budget were left, it needs {stage.least_s:.0f}"
                self.results.write()
                continue
            record |= {"begun": record["begun"] + 1, "error": None, "left": None}
            began = time.monotonic()
            log = self.scratch / f"{stage.letter}.log"
            log.write_bytes(b"")
            limit = budget if stage is stages[-1] else min(stage.limit_s, budget)  # it leaves time to those after it
            try:
                self._run_stage(stage, began + limit, log)
            finally:
                record["seconds"] += time.monotonic() - began
                self.results.add_log(stage.letter, log.read_bytes())
                self.results.write()

    def _run_stage(self, stage: Stage, deadline: float, log: Path) -> None:
        settled = self.results.settled(stage.letter)
        while time.monotonic() < deadline:
            lines = self.scratch / f"{stage.letter}.jsonl"
            lines.write_bytes(b"")
            setting = Setting(
                self.device, self.scratch, self.results.out, deadline, settled, self.results.figures(), lines,
                self.images,
            )  # fmt: skip
            watch = _Watch(stage, setting, self.results)
            process = start_process(self.device, serve, stage, setting, log)
            try:
                watch.until_end(process)
            finally:
                _end(process)
            if watch.finished or not watch.tried or time.monotonic() >= deadline:
                break
            settled |= watch.tried


class _Watch:
    """Follows the lines of one process of a stage and ends it when its time is over."""

    def __init__(self, stage: Stage, setting: Setting, results: Results) -> None:
        self.stage, self.setting, self.results = stage, setting, results
        self.finished = False
        self.tried: frozenset[str] = frozenset()
        self._read = 0  # bytes of the file
        self._case: str | None = None  # the one that is going on
        self._began = 0.0
        self._partial: Any = None

    def until_end(self, process: BaseProcess) -> None:
        """Wait for the process to end, by itself or because a limit is reached, and settle what it was at."""
        while process.is_alive():
            process.join(_POLL_S)
            self._take_lines()
            now = time.monotonic()
            if now >= self.setting.deadline:
                self._give_up("cut", "the time of the stage or of the budget was over")
                return
            if self._case and now >= self._began + self.stage.case_limit_s:
                self._give_up("failed", f"took more than {self.stage.case_limit_s:g} s and was ended")
                return
        self._take_lines()
        code = process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        why = f"its process ended with {how}; log.txt has what it printed"
        if self._case:
            self._give_up("failed", why)
        elif not self.finished and not self.tried and not self._record["error"]:
            self._record["error"] = why

    @property
    def _record(self) -> dict[str, Any]:
        return self.results.stage(self.stage.letter)

    def _take_lines(self) -> None:
        with open(self.setting.lines, "rb") as stream:
            stream.seek(self._read)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._take(json.loads(line))
        if whole:
            self.results.write()

    def _take(self, line: dict[str, Any]) -> None:
        if "expected" in line:
            self._record["expected"] = line["expected"]
        elif "error" in line and "case" not in line:
            self._record["error"] = line["error"]
        elif "begun" in line:
            self._case, self._began, self._partial = line["begun"], time.monotonic(), None
            self.tried |= {line["begun"]}
        elif "partial" in line:
            self._partial = line["partial"]
        elif "case" in line:
            figures = line["figures"]
            self._settle(**line | {"figures": self._partial if figures is None else figures})
        else:
            self.finished = True

    def _settle(self, case: str, **outcome: Any) -> None:
        self._case = None
        print(self.results.settle(self.stage.letter, case, **outcome), flush=True)

    def _give_up(self, state: str, why: str) -> None:
        """The case that is going on will not end by itself; what it has noted is kept."""
        if self._case:
            elapsed = time.monotonic() - self._began
            self._settle(self._case, state=state, seconds=elapsed, figures=self._partial, error=why)
        self.results.write()


def _end(process: BaseProcess) -> None:
    """End the process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):  # it has not become a group's leader yet, or the group is gone
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()
