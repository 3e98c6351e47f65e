from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from vitscale.checkpoint.fragments import Piece
from vitscale.checkpoint.saving import save_checkpoint
from vitscale.checkpoint.store import Checkpoint, SoleRank, open_checkpoint
from vitscale.engine.engine import load_weights
from vitscale.errors import CheckpointError


def model(frozen: Iterable[str] = (), width: int = 3) -> nn.Module:
    made = nn.Sequential(nn.Linear(width, 3), nn.BatchNorm1d(3))
    made.register_buffer("table", torch.arange(3), persistent=False)  # is recomputed, not saved
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return made


def saved(folder: Path, frozen: Iterable[str]) -> tuple[Checkpoint, nn.Module]:
    source = model(frozen)
    source[1].running_mean.fill_(7.0)
    tensors = {("param" if p.requires_grad else "frozen", name): p for name, p in source.named_parameters()}
    tensors |= {("buffer", name): buffer for name, buffer in source.named_buffers() if name != "table"}
    pieces = [
        Piece(kind, name, tuple(tensor.shape), 0, tensor.detach().reshape(-1).numpy())
        for (kind, name), tensor in tensors.items()
    ]
    return open_checkpoint(save_checkpoint(folder, 1, pieces, {}, SoleRank(), 1), SoleRank()), source


@pytest.mark.parametrize("frozen", [(), ("0.weight", "0.bias")])
def test_all_of_it_comes_back(tmp_path: Path, frozen: tuple[str, ...]) -> None:
    checkpoint, source = saved(tmp_path, frozen)
    other = model(frozen)
    load_weights(other, checkpoint)
    for name, value in source.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)


def test_other_frozen_parameters_are_named(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path, ["0.weight", "0.bias"])
    with pytest.raises(CheckpointError) as caught:
        load_weights(model(["0.bias", "1.weight"]), checkpoint)
    message = str(caught.value)
    assert "1 there alone: 0.weight; 1 here alone: 1.weight" in message
    assert "freeze the same ones, or start another run.name with model.init_from" in message
    with pytest.raises(CheckpointError, match=r"2 there alone: 0\.weight, 0\.bias; 0 here alone; freeze"):
        load_weights(model(), checkpoint)


def test_another_shape_is_told_whether_frozen_or_not(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path, ["0.weight"])
    with pytest.raises(CheckpointError, match=r"param/frozen tensors .*0.weight \(saved \[3, 3\], here \[3, 5\]\)"):
        load_weights(model(width=5), checkpoint)
