"""Stage h: the tests that are marked gpu, with this machine's own Python."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting, Unable

_ROOT = Path(__file__).parents[3]
_OUTCOME = re.compile(r"^(tests/.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")
_UNCOLLECTED = re.compile(r"^ERROR (tests/\S+)")
_NOTHING_SELECTED = 5  # pytest's exit code
CORE = "tests/gpu/test_correctness.py"  # stages b and e
PLACES = ("tests/gpu", "tests/augment/test_resample.py", "tests/bench/test_step.py", "tests/engine/test_optim.py")


def cases(setting: Setting) -> Cases:
    return {"pytest": partial(_pytest, setting)}


def _pytest(setting: Setting) -> Figures:
    """Run them, noting each as it ends."""
    if importlib.util.find_spec("pytest") is None:
        raise Unable(f"pytest is not installed for {sys.executable}")
    if not (_ROOT / "tests").is_dir():
        raise Unable(f"{_ROOT}/tests is not there")
    places = [place for place in PLACES if (_ROOT / place).exists()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", f"--ignore={CORE}", *places]  # fmt: skip
    counts = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
    figures: Figures = {"counts": counts, "failed": []}
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            if outcome := _OUTCOME.match(line):
                counts[outcome[2]] += 1
                if outcome[2] in ("FAILED", "ERROR"):
                    figures["failed"].append(outcome[1])
                figures["text"] = ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count)
                setting.note(figures)
            elif (broken := _UNCOLLECTED.match(line)) and broken[1] not in figures["failed"]:
                figures["failed"].append(broken[1])
    if process.returncode not in (0, _NOTHING_SELECTED):
        raise Mismatch(f"pytest ended with {process.returncode}: {', '.join(figures['failed']) or 'see log.txt'}")
    if not counts["PASSED"]:
        raise Unable(f"no test could run: {counts['SKIPPED']} were skipped; log.txt has the reasons")
    return figures
