"""The launcher itself, on a machine without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.integration.worlds import ROOT, losses


def test_torchrun_without_a_compiler(config: Path, tmp_path: Path) -> None:
    """launch/torchrun.sh with 2 ranks and ZeRO-2 where no c++, cc or ninja is on PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "env", "dirname", "git", "uname"):
        (tools / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    assert shutil.which("c++", path=str(tools)) is None
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {"PATH": str(tools), "NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"VITSCALE_VENV": sys.prefix, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    command = [str(tools / "bash"), str(ROOT / "launch" / "torchrun.sh"), "pretrain", str(config)]
    command += ["parallel.zero_stage=2", "train.steps=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "runs" / "run")) == 3
    assert not list(tmp_path.glob("extensions/**/*.so"))
