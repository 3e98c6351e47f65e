from __future__ import annotations

import torch

from vitscale.engine.ema import Ema
from vitscale.engine.zero_state import Fragment


def test_moves_towards_the_weights_and_changes_places_with_them_to_the_bit() -> None:
    torch.manual_seed(0)
    flat = torch.randn(7)
    fragments = [Fragment("a", (2, 2), 0, flat, 0, 4), Fragment("b", (5,), 3, flat, 4, 2)]  # 1 is padding
    start = flat.clone()
    ema = Ema([flat], decay=0.9)
    flat.copy_(torch.randn(7))
    ema.update()
    weights, average = flat.clone(), [ema.of(fragment).clone() for fragment in fragments]
    torch.testing.assert_close(torch.cat(average), (0.9 * start + 0.1 * weights)[:6])
    ema.exchange(fragments)
    torch.testing.assert_close(flat[:6], torch.cat(average), rtol=0, atol=0)
    ema.exchange(fragments)
    torch.testing.assert_close(flat, weights, rtol=0, atol=0)
    for fragment, values in zip(fragments, average, strict=True):
        torch.testing.assert_close(ema.of(fragment), values, rtol=0, atol=0)
