"""What DeepSpeed's own save_checkpoint writes, read by ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.integration.worlds import Launcher
from vitscale.interop.deepspeed_folder import read_deepspeed


def save(stage: int, folder: str) -> dict[str, Any]:
    """On each rank: two steps of a small model with two groups, a buffer and a frozen weight; its weights."""
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    decayed, others = (
        [p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == wide] for wide in (True, False)
    )
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=True)
    for _ in range(2):
        loss = engine(torch.randn(4, 7)).square().mean()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(folder)
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        weights = {name: p.detach().clone().tolist() for name, p in parameters.items()}
    weights["1.running_mean"] = model[1].running_mean.tolist()
    deepspeed.comm.destroy_process_group()
    return weights


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_checkpoint_is_read(launcher: Launcher, tmp_path: Path, stage: int) -> None:
    expected = launcher.call(save, ranks=2, stage=stage, folder=str(tmp_path / "saved"))[0]
    found = read_deepspeed(tmp_path / "saved")
    assert found.keys() == expected.keys() | {"1.running_var", "1.num_batches_tracked"}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values), rtol=0, atol=0, msg=name)
