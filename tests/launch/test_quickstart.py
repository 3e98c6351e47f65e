from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("override", ["run.name=mine", "run.dir=/elsewhere"])
def test_where_the_quick_start_lies_is_fixed(override: str) -> None:
    """Refused in one line before any set-up."""
    command = ["bash", str(ROOT / "launch" / "quickstart.sh"), override]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "run." in done.stderr
    assert done.stdout == ""
