"""Ranks that fail, under torchrun with their exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vitscale.run_folder import BAD_INPUT, STOPPED

RANKS = """
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(300)  # until torchrun ends it
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [(f"sys.exit({BAD_INPUT})", BAD_INPUT), pytest.param("os.kill(os.getpid(), 9)", STOPPED, marks=pytest.mark.full)],
)
def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path: Path, end: str, code: int) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(end=end))
    command = [sys.executable, "-m", "vitscale.engine.elastic", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
