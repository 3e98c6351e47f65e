"""What the GPU suite leaves in its folder: results.json, summary.txt and log.txt, whole at any moment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vitscale.bench.gpu_suite.cases import Stage
from vitscale.errors import VitscaleError
from vitscale.files.atomic import write_atomically
from vitscale.text import aligned

FORMAT = "vitscale-gpu-suite-1"
SETTLED = ("passed", "cannot")  # states that are not tried again
MOST_FIGURES = 1 << 20  # bytes of a case's figures
MOST_RESULTS = 12 << 20  # bytes of results.json with them; names and errors, which are short, may go beyond
MOST_LOG = 8 << 20  # bytes of log.txt
MOST_STAGE_LOG = 256 << 10  # bytes of a stage's part of it


class Results:
    """The folder OUT of the suite, with what earlier calls left in it."""

    def __init__(self, out: Path, device: str, stages: Sequence[Stage]) -> None:
        self.out, self.stages = out, stages
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VitscaleError(f"OUT={out}: cannot be made ({error}); name a folder of your own") from None
        self._file = out / "results.json"
        self.content: dict[str, Any] = {"format": FORMAT, "device": device, "stages": {}}
        if self._file.exists():
            self.content = self._read(device)
        for stage in stages:
            fresh = {"title": stage.title, "begun": 0, "seconds": 0.0, "expected": None, "cases": {}, "error": None,
                     "left": None}  # fmt: skip
            self.content["stages"].setdefault(stage.letter, fresh)

    def _read(self, device: str) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise VitscaleError(f"{self._file}: is not JSON ({error}); name another OUT") from None
        written = (content.get("format"), content.get("device"))
        if written != (FORMAT, device):
            raise VitscaleError(f"{self._file}: is of {written[0]} on {written[1]}, not of {FORMAT} on {device}; "
                                "name another OUT")  # fmt: skip
        return content

    def stage(self, letter: str) -> dict[str, Any]:
        """The record of a stage: see `__init__`; its `cases` are {name: {state, seconds, figures, error}}."""
        return self.content["stages"][letter]

    def state(self, letter: str) -> str:
        """passed, cannot (no case can run here), failed, cut (some cases are left) or not run."""
        record = self.stage(letter)
        states = [case["state"] for case in record["cases"].values()]
        if record["error"] or "failed" in states:
            return "failed"
        if record["expected"] and self.left(letter) == []:
            return "cannot" if set(states) == {"cannot"} else "passed"
        return "cut" if record["begun"] else "not run"

    def settled(self, letter: str) -> frozenset[str]:
        """The cases that need no other try."""
        cases = self.stage(letter)["cases"]
        return frozenset(name for name, case in cases.items() if case["state"] in SETTLED)

    def left(self, letter: str) -> list[str]:
        """The cases that have not passed, as far as they are known."""
        return [name for name in self.stage(letter)["expected"] or () if name not in self.settled(letter)]

    def in_order(self, letters: Iterable[str]) -> list[Stage]:
        """The stages of `letters` that are not done: those less often tried first, then by worth."""
        chosen = set(letters)
        left = [stage for stage in self.stages if stage.letter in chosen and self.state(stage.letter) not in SETTLED]
        return sorted(left, key=lambda stage: self.stage(stage.letter)["begun"])  # stable

    def figures(self) -> dict[str, dict[str, Any]]:
        """What passed, by stage and case."""
        return {
            letter: {name: case["figures"] for name, case in record["cases"].items() if case["state"] == "passed"}
            for letter, record in self.content["stages"].items()
        }

    def settle(self, letter: str, name: str, **case: Any) -> str:
        """Keep the outcome of a case; its line for the terminal."""
        case = {"state": None, "seconds": 0.0, "figures": None, "error": None} | case
        self.stage(letter)["cases"][name] = case
        size = len(json.dumps(case["figures"]))
        if size > MOST_FIGURES or len(self._as_json()) > MOST_RESULTS:
            case["figures"] = {"text": f"{size} bytes of figures are too many for results.json"}
        return f"{letter}  {name}: {case['state']}, {case['seconds']:.1f} s  {_text(case)}"

    def write(self) -> None:
        """Write results.json and summary.txt."""
        write_atomically(self._file, self._as_json())
        write_atomically(self.out / "summary.txt", self.summary())

    def _as_json(self) -> str:
        """In ASCII: as many bytes as characters."""
        return json.dumps(self.content, indent=1) + "\n"

    def add_log(self, letter: str, text: bytes) -> None:
        """Append what a stage printed, of both only the end if they are long."""
        log = self.out / "log.txt"
        with open(log, "ab") as stream:
            stream.write(f"\n==== stage {letter}\n".encode() + text[-MOST_STAGE_LOG:])
        if log.stat().st_size > MOST_LOG:
            write_atomically(log, log.read_bytes()[-MOST_LOG // 2 :])

    def summary(self) -> str:
        """The table: a line a stage, below it one a case."""
        rows = [("stage", "state", "seconds", "figures")]
        for stage in self.stages:
            letter = stage.letter
            record = self.stage(letter)
            note = record["error"] or record["left"] or ""
            rows.append((f"{letter}  {stage.title}", self.state(letter), f"{record['seconds']:.1f}", note))
            for name, case in record["cases"].items():
                rows.append((f"     {name}", case["state"], f"{case['seconds']:.1f}", _text(case)))
            rows += [(f"     {name}", "not run", "", "") for name in self.left(letter) if name not in record["cases"]]
        return aligned(rows, right={2}) + "\n"


def _text(case: dict[str, Any]) -> str:
    """What a case has to say in a line: why it did not pass, and what it measured all the same."""
    measured = (case["figures"] or {}).get("text", "")
    if not case["error"]:
        return measured
    return case["error"] + (f" (so far: {measured})" if measured else "")
