"""A power cut: what has its name is on the disk, by the order of the calls that a save makes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_files_then_folder_then_name_then_the_folder_of_the_name(tmp_path: Path) -> None:
    """Of a save by two ranks, each of whose files is written by a process of its own."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here, to see the calls of the kernel")
    calls, saved = tmp_path / "calls", tmp_path / "saved"
    # A file a process, since in one for all a call that takes long is two lines; put in order by when a call began.
    traced = ["strace", "-ff", "-ttt", "-y", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2", "-o", str(calls)]
    saver = [sys.executable, "-m", "tests.checkpoint.saver", str(saved), "3", "2", "no point"]
    done = subprocess.run([*traced, *saver], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    draft, name = ".tmp-step_00000003", "step_00000003"
    lines = [line for path in tmp_path.glob("calls.*") for line in path.read_text().splitlines()]
    text = "\n".join(sorted(lines, key=lambda line: float(line.split()[0])))
    found = re.findall(rf'(fsync|rename)\(.*?{re.escape(str(saved))}/?([^>",]*)[>"].*= 0', text)
    assert sorted(found[:2]) == [("fsync", f"{draft}/state-0000{rank}.safetensors") for rank in (0, 1)]
    assert found[2:] == [("fsync", f"{draft}/manifest.json"), ("fsync", draft), ("rename", draft), ("fsync", "")]
    assert (saved / name).is_dir()
