"""Small stages for the runner's tests, each of which passes or fails in another way."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from vitscale.bench.gpu_suite.cases import Cases, Figures, Setting, Unable, Unfinished


def make_setting(folder: Path, device: str = "cpu", **earlier: Any) -> Setting:
    """Of a stage's process whose files are in `folder`; earlier: figures of the stages before."""
    return Setting(device, folder, folder, time.monotonic() + 3600, frozenset(), earlier, folder / "lines.jsonl")


def passing(setting: Setting) -> Cases:
    return {name: _counted(setting, name) for name in ("one", "two")}


def crashing(setting: Setting) -> Cases:
    def crash() -> Figures:
        print("what it printed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    return {"before": _counted(setting, "before"), "crashes": crash, "after": _counted(setting, "after")}


def failing(setting: Setting) -> Cases:
    def fail() -> Figures:
        raise ValueError("3 is not 4\nand more")

    return {"fails": fail, "after": _counted(setting, "after")}


def hanging(setting: Setting) -> Cases:
    """It has a child that would outlive it, and has noted something."""

    def hang() -> Figures:
        with subprocess.Popen(["sleep", "600"]) as child:
            Path(setting.scratch / "child").write_text(str(child.pid))
            setting.note({"text": "half of it"})
        return {}

    return {"before": _counted(setting, "before"), "hangs": hang, "after": _counted(setting, "after")}


def unable(setting: Setting) -> Cases:
    def say() -> Figures:
        raise Unable("no tape drive here")

    return {"tape": say}


def hurried(setting: Setting) -> Cases:
    """Has no time for its second half until it is mended."""

    def run() -> Figures:
        setting.note({"text": "the first half"})
        if not (setting.out.parent / "mended").exists():
            raise Unfinished("no time left for the second half")
        return {"text": "both halves"}

    return {"halves": run, "after": _counted(setting, "after")}


def missing(setting: Setting) -> Cases:
    raise ImportError("No module named 'tape'")


def large(setting: Setting) -> Cases:
    return {"large": lambda: {"text": "x" * (2 << 20)}, "after": lambda: {"text": "small"}}


def talking(setting: Setting) -> Cases:
    def talk() -> Figures:
        print("y" * (1 << 20) + "the end", flush=True)
        return {}

    return {"talks": talk}


def earlier(setting: Setting) -> Cases:
    """What the stages before gave."""
    return {"sees": lambda: {"text": str(setting.earlier["a"]["one"]["text"])}}


def mended(setting: Setting) -> Cases:
    """Fails until somebody has mended it."""

    def run() -> Figures:
        if not (setting.out.parent / "mended").exists():
            raise ValueError("not mended")
        return {"text": "mended"}

    return {"sound": _counted(setting, "sound"), "broken": run}


def slow(setting: Setting) -> Cases:
    """Far too slow until it is mended."""

    def run() -> Figures:
        if not (setting.out.parent / "mended").exists():
            time.sleep(600)
        return {}

    return {"first": _counted(setting, "first"), "slow": run, "last": _counted(setting, "last")}


def _counted(setting: Setting, name: str):  # type: ignore[no-untyped-def]
    """A case that passes and leaves a trace of each time that it ran."""

    def run() -> Figures:
        with open(setting.out.parent / "ran", "a", encoding="utf-8") as stream:
            stream.write(f"{name}\n")
        return {"text": f"{name} is well"}

    return run
