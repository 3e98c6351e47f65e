"""What the host waits for the GPU for in a step, by CUDA's own account; tests/engine has the same of a CPU."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import LR, Training, batch
from vitscale.world import enter

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_the_guard_alone(stage: int, precision: str, single_rank: None) -> None:
    """Once a step the host asks whether the gradient is finite: at stage 0 here, above it in DeepSpeed's step."""
    config = small_config("mae")
    train = replace(config.train, precision=precision)
    config = replace(config, train=train, parallel=replace(config.parallel, zero_stage=stage))
    with Training(config, enter()) as training:
        training.steps(0, 2)
        numbers = range(2 * training.engine.accumulation, 3 * training.engine.accumulation)
        inputs = [batch(config, number, training.backend.device) for number in numbers]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                training.engine.step(inputs, LR)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = Counter(Path(each.filename).name for each in warned if "synchronizing CUDA" in str(each.message))
    assert waits == {"ddp.py" if stage == 0 else "utils.py": 1}
