"""What a start compiled is there for the next one, on a node whose own cache is empty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys
from pathlib import Path
import torch
from tests.models.shapes import inputs, tiny
from vitscale.engine.compile_cache import keep_compiled, load_compiled
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.world import World

load_compiled(Path(sys.argv[1]), World())
model = tiny(ViTMAEForPreTraining, num_hidden_layers=2)
model.compile_blocks()
model(**inputs(model, n=2)).loss.backward()
keep_compiled(Path(sys.argv[1]), World())
found = torch._dynamo.utils.counters["inductor"]
print(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
"""


def start(run: Path, cache: Path) -> list[int]:
    """Graphs that were found and that were compiled."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", START, str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.full
def test_the_next_start_compiles_nothing(tmp_path: Path) -> None:
    found, compiled = start(tmp_path, tmp_path / "one")
    assert found == 0
    assert compiled > 0
    assert start(tmp_path, tmp_path / "two") == [compiled, 0]
