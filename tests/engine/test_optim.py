from __future__ import annotations

import torch
from torch import nn

from vitscale.config.schema import Optimizer
from vitscale.engine.optim import fill_state, make_optimizer


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Conv2d(1, 2, 2))
    decayed, plain = make_optimizer(model, Optimizer(weight_decay=0.1), fused=False).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4), (2, 1, 2, 2)]
    assert all(p.ndim == 1 for p in plain["params"])


def test_no_empty_group() -> None:
    assert len(make_optimizer(nn.Linear(4, 3, bias=False), Optimizer(), fused=False).param_groups) == 1


def test_state_made_by_hand_is_what_adamw_makes() -> None:
    """The first steps are the same, bit by bit, as with the state that AdamW makes lazily."""
    results = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        optimizer = make_optimizer(model, Optimizer(), fused=False)
        if by_hand:
            fill_state(optimizer, list(model.parameters()), fused=False)
        for _ in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    for lazy, filled in zip(*results, strict=True):
        torch.testing.assert_close(lazy, filled, rtol=0, atol=0)
