"""Training on one GPU: NCCL, every ZeRO stage, fp32 and bf16, compiled blocks, against the CPU's golden losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import CONFIG, make_shards
from tests.integration.worlds import ROOT, losses, rows

pytestmark = pytest.mark.gpu

GOLDEN = ROOT / "tests" / "integration" / "golden_losses.json"


@pytest.fixture(scope="module")
def gpu_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


def _train(shards: Path, folder: Path, *overrides: str) -> Path:
    (folder / "config.yaml").write_text(CONFIG.format(runs=folder / "runs", shards=f"{shards}/*.tar"))
    command = [sys.executable, "-m", "vitscale.cli", "pretrain", str(folder / "config.yaml"), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "run"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("objective", ["mae", "multitask"])
def test_fp32_follows_the_cpu(gpu_shards: Path, tmp_path: Path, stage: int, objective: str) -> None:
    run = _train(gpu_shards, tmp_path, f"parallel.zero_stage={stage}", f"objective.name={objective}")
    golden = json.loads(GOLDEN.read_text())[objective]
    assert list(losses(run).values()) == pytest.approx(golden, rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16(gpu_shards: Path, tmp_path: Path, stage: int, compiled: bool) -> None:
    micro = "train.micro_batch=16" if stage == 1 else "train.micro_batch=8"
    flags = ["train.precision=bf16", f"train.compile={str(compiled).lower()}", micro]
    run = _train(gpu_shards, tmp_path, f"parallel.zero_stage={stage}", *flags)
    golden = json.loads(GOLDEN.read_text())["mae"]
    assert list(losses(run).values()) == pytest.approx(golden, rel=0.03)
    assert rows(run)[-1]["skipped_steps"] == 0


def test_resume_on_the_gpu_is_bit_identical(gpu_shards: Path, tmp_path: Path) -> None:
    """Saved at step 10 under ZeRO-2 in bf16 (fused AdamW), the second half is the same bits."""
    flags = ["parallel.zero_stage=2", "train.precision=bf16", "checkpoint.every_steps=10", "checkpoint.keep=2"]
    unbroken = losses(_train(gpu_shards, tmp_path, *flags))
    run = tmp_path / "runs" / "run"
    for path in sorted((run / "checkpoints" / "step_00000020").iterdir()):
        path.unlink()
    (run / "checkpoints" / "step_00000020").rmdir()
    assert losses(_train(gpu_shards, tmp_path, *flags)) == unbroken


@pytest.mark.parametrize(("preset", "batch"), [("B", 256), ("L", 128), ("H", 64)])
def test_step_of_each_size(preset: str, batch: int) -> None:
    """`vitscale bench step` runs at the sizes that it is for."""
    command = [sys.executable, "-m", "vitscale.cli", "bench", "step", "--preset", preset, "--batch", str(batch)]
    command += ["--precision", "bf16", "--rounds", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])
