"""The models that are compared are of the same sizes."""

from __future__ import annotations

import pytest
import torch

from vitscale.bench.peers import OURS, builders, run_config
from vitscale.models.auto import build_model


@pytest.mark.parametrize(("size", "objective", "libraries"), [
    ("Ti", "classification", {"timm", "transformers"}),
    ("H", "classification", {"timm", "transformers"}),  # patches of 14
    ("g", "classification", {"timm", "transformers"}),  # an MLP of 48/11 the width
    ("high", "classification", {"timm", "transformers"}),  # 384 pixels
    ("B", "mae", {"transformers"}),
])  # fmt: skip
def test_all_have_the_same_number_of_parameters(size: str, objective: str, libraries: set[str]) -> None:
    run = run_config(size, objective)
    with torch.device("meta"):
        ours = build_model(run)
        peers = {name: build() for name, build in builders(run).items() if name != OURS}
    assert set(peers) == libraries
    for model in peers.values():
        counts = [sum(p.numel() for p in one.parameters() if p.requires_grad) for one in (ours, model)]
        assert counts[0] == counts[1] > 5_000_000
