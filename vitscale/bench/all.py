"""`vitscale bench NAME`, and what each of them tells of the run; `vitscale bench all`: every one once, briefly."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from vitscale import __version__
from vitscale.bench.measuring import cpu_name
from vitscale.bench.rounds import check_file
from vitscale.files.atomic import write_atomically
from vitscale.inference.command import above_zero

# So brief that all of them take minutes on two cores; by themselves they measure longer. By the words that a command
# begins with.
BRIEF = {
    "data": ["--seconds", "1", "--rounds", "2", "--images", "512"],
    "augment": ["--rounds", "2", "--batch", "32"],
    "step": ["--preset", "Ti", "--rounds", "3"],
    "step --objective classification": ["--preset", "Ti", "--rounds", "3"],
    "model": ["--preset", "Ti", "--rounds", "3"],
    "checkpoint": ["--engine", "Ti", "--preset", "S", "--rounds", "2", "--large", "g"],
    "startup": ["--preset", "Ti", "--shards", "20000", "--rounds", "3", "--joins", "2,4"],
    "exchange": ["--ranks", "2", "4", "--rounds", "2"],
    "guards": ["--preset", "S", "--batch", "4", "--rounds", "3"],
    "zero": ["--rounds", "2", "--steps", "10"],
    "host": ["--rounds", "2", "--steps", "50"],
    "sharding": ["--preset", "Ti", "--batch", "8", "--rounds", "2", "--steps", "3"],
}
_LIBRARIES = (
    "torch", "deepspeed", "accelerate", "transformers", "timm", "torchvision", "onnxruntime", "numpy", "webdataset",
    "nvidia-nvimgcodec-cu12", "simplejpeg", "pillow",
)  # fmt: skip
_GPU = "what a GPU does: bash launch/gpu_suite.sh OUT"


def run(what: str, arguments: Sequence[str]) -> int:
    """One benchmark, or all; its last line, JSON of what it measured, when and with what, is --json FILE too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path)
    own, rest = parser.parse_known_args(arguments)
    check_file("--json", own.json)
    about = _about(what, rest)
    main = all_briefly if what == "all" else importlib.import_module(f"vitscale.bench.{what}").main
    printed = _Printed(sys.stdout)
    with contextlib.redirect_stdout(printed):
        code = main(rest)
    if printed.result is not None:  # None on all ranks but one
        line = json.dumps(printed.result | about)
        print(line)
        if own.json is not None:
            write_atomically(own.json, line + "\n")
    return code


def _about(what: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The command, its time, the machine and the libraries."""
    versions = {"vitscale": __version__}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "command": shlex.join(["vitscale", "bench", what, *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}",
        "python": platform.python_version(),
        "versions": versions,
    }


class _Printed(io.TextIOBase):
    """A stream that passes on all lines but one of JSON, which it keeps."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._begun = stream, ""
        self.result: dict[str, Any] | None = None

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.startswith("{"):
                self.result = json.loads(line)
            else:
                self._stream.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def all_briefly(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON. 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="vitscale bench all", description=(__doc__ or "").splitlines()[0])
    names = list(dict.fromkeys(name.split()[0] for name in BRIEF))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--limit", type=above_zero, default=300, metavar="SECONDS",
                        help="each is stopped after so many (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    took: dict[str, float] = {}
    for name, brief in BRIEF.items():
        if name.split()[0] not in options.only:
            continue
        words = ["bench", *name.split(), *brief]
        print(f"\n# vitscale {' '.join(words)}", flush=True)
        began = time.monotonic()
        result, problem = _one(words, options.limit)
        took[name] = time.monotonic() - began
        if result is None:
            failed[name] = problem
            print(f"not measured: {problem}", flush=True)
        else:
            results[name] = result
    missing = {f"{name}: {who}": why for name, each in results.items() for who, why in each.get("left_out", {}).items()}
    not_here = [*missing, *(f"{name}: {why}" for name, why in failed.items()), _GPU]
    print(f"\n{sum(took.values()):.0f} s; not measured here: {'; '.join(not_here)}")
    all_of_it = {"bench": "all", "results": results, "failed": failed, "seconds": took, "left_out": missing}
    print(json.dumps(all_of_it))
    return 1 if failed else 0


def _one(words: Sequence[str], limit_s: float) -> tuple[dict[str, Any] | None, str]:
    """The result of `vitscale WORDS`, whose lines are shown as they come, or None and why there is none."""
    printed, late = _Printed(sys.stdout), threading.Event()

    def stop() -> None:
        late.set()
        _end(process)

    command = [sys.executable, "-u", "-m", "vitscale.cli", *words]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True) as process,
    ):
        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            for line in process.stdout or ():
                printed.write(line)
                printed.flush()
            process.wait()
        finally:
            timer.cancel()
            _end(process)
        errors.seek(0)
        told = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
    if late.is_set():
        return None, f"took longer than {limit_s:g} s"
    return (None, told[-1]) if process.returncode else (printed.result, told[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and all that it has started, in its group or, as a launcher's ranks, in one of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
