"""`vitscale bench all`: every benchmark once, briefly, each in a process of its own; and `--json FILE` of each."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vitscale.bench.measuring import CPU, device_name
from vitscale.errors import ConfigError
from vitscale.files.atomic import write_atomically

# So brief that all of them take minutes on two cores; by themselves they measure longer.
BRIEF = {
    "data": ["--seconds", "1", "--rounds", "2", "--images", "512"],
    "augment": ["--rounds", "2", "--batch", "32"],
    "step": ["--preset", "Ti", "--rounds", "3"],
    "model": ["--preset", "Ti", "--rounds", "3"],
    "checkpoint": ["--engine", "Ti", "--preset", "S", "--rounds", "2", "--large", "g"],
    "startup": ["--preset", "Ti", "--shards", "20000", "--rounds", "3", "--joins", "2,4"],
    "exchange": ["--ranks", "2", "4", "--rounds", "2"],
    "guards": ["--preset", "S", "--batch", "4", "--rounds", "3"],
    "zero": ["--rounds", "2", "--steps", "10"],
    "host": ["--rounds", "2", "--steps", "50"],
    "sharding": ["--preset", "Ti", "--batch", "8", "--steps", "3"],
}
_LIBRARIES = ("torch", "deepspeed", "accelerate", "transformers", "timm", "webdataset", "torchvision")
_GPU = "what a GPU does: bash launch/gpu_suite.sh OUT"


def run(what: str, arguments: Sequence[str]) -> int:
    """One benchmark, or all; with --json FILE its last line, which is JSON, is also a file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path)
    own, rest = parser.parse_known_args(arguments)
    if own.json is not None and not own.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {own.json}: must be a file in a folder that is there")
    main = all_briefly if what == "all" else importlib.import_module(f"vitscale.bench.{what}").main
    printed = _Kept(sys.stdout)
    with contextlib.redirect_stdout(printed):
        code = main(rest)
    if own.json is not None and code == 0:
        write_atomically(own.json, printed.last_line() + "\n")
    return code


class _Kept(io.TextIOBase):
    """A stream that passes on what is printed, and has its last line."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._text = stream, ""

    def write(self, text: str) -> int:
        self._text = (self._text + text).rstrip("\n").rpartition("\n")[2] + "\n" * text.endswith("\n")
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def last_line(self) -> str:
        return self._text.rstrip("\n")


def all_briefly(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON. 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="vitscale bench all", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BRIEF, default=list(BRIEF), help="(default: all)")
    options = parser.parse_args(arguments)
    results, failed, took = {}, {}, {}
    for name in options.only:
        command = [sys.executable, "-m", "vitscale.cli", "bench", name, *BRIEF[name]]
        print(f"\n# vitscale bench {' '.join([name, *BRIEF[name]])}", flush=True)
        began = time.monotonic()
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
    print(json.dumps({
        "bench": "all", "machine": device_name(CPU), "python": platform.python_version(),
        "versions": _versions(), "results": results, "failed": failed, "seconds": took, "left_out": missing,
    }))  # fmt: skip
    return 1 if failed else 0


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
