from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitscale.engine.zero_state import Fragment, frozen_share, share


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5))
def test_shares_are_even_and_hold_each_element_once(counts: list[int], world_size: int) -> None:
    flats = [torch.arange(2, 2 + count) for count in counts]
    whole = [Fragment(f"p{number}", (len(flat),), 0, flat, 0, len(flat)) for number, flat in enumerate(flats)]
    shares = [share(whole, rank, world_size) for rank in range(world_size)]
    held = [(run.name, run.start + place, int(value)) for runs in shares for run in runs
            for place, value in enumerate(run.weights())]  # fmt: skip
    assert held == [(f"p{number}", place, place + 2) for number, count in enumerate(counts) for place in range(count)]
    sizes = [sum(run.count for run in runs) for runs in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_share_of_what_zero_rounds_is_a_copy_of_that_share_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    exact = torch.cat([p.detach().clone().view(-1) for p in model[0].parameters()])
    at_stage_0, under_zero = (frozen_share(model, stage, 0, 2) for stage in (0, 2))
    assert [run.flat.data_ptr() for run in at_stage_0] == [model[0].weight.data_ptr()]
    assert [run.flat.numel() for run in under_zero] == [10]
    with torch.no_grad():
        model[0].weight.zero_()
    torch.testing.assert_close(under_zero[0].weights(), exact[:10], rtol=0, atol=0)
