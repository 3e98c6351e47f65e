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
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vitscale import __version__
from vitscale.bench.measuring import cpu_name
from vitscale.bench.rounds import check_file
from vitscale.files.atomic import write_atomically

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
    options = parser.parse_args(arguments)
    results, failed, took = {}, {}, {}
    for name, brief in BRIEF.items():
        if name.split()[0] not in options.only:
            continue
        words = ["bench", *name.split(), *brief]
        print(f"\n# vitscale {' '.join(words)}", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "vitscale.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        took[name] = time.monotonic() - began
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            failed[name] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            print(f"failed: {failed[name]}", flush=True)
            continue
        results[name] = json.loads(lines[-1])
        print("\n".join(lines[:-1]), flush=True)
    missing = {f"{name}: {who}": why for name, each in results.items() for who, why in each.get("left_out", {}).items()}
    print(f"\n{sum(took.values()):.0f} s; not measured here: {'; '.join([*missing, *failed, _GPU])}")
    result = {"bench": "all", "results": results, "failed": failed, "seconds": took, "left_out": missing}
    print(json.dumps(result))
    return 1 if failed else 0
