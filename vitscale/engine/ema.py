"""A moving average of the weights, for evaluation and for the exported model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitscale.engine.zero_state import Fragment


class Ema:
    """fp32 averages in the layout of the master weights: ema = decay x ema + (1 - decay) x weights."""

    def __init__(self, flats: Sequence[torch.Tensor], decay: float) -> None:
        """Start from the weights. flats: the tensors that the optimizer steps."""
        self.decay = decay
        self._weights = [flat.detach() for flat in flats]
        self._averages = [weights.clone() for weights in self._weights]
        self._by_flat = dict(zip(flats, self._averages, strict=True))

    def update(self) -> None:
        """Average in the weights of a step that was applied."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)

    def of(self, fragment: Fragment) -> torch.Tensor:
        """The averages of a fragment's elements, a 1-D view."""
        return fragment.within(self._by_flat[fragment.flat])

    def exchange(self, fragments: Sequence[Fragment]) -> None:
        """Exchange the averages and the master weights; a second call undoes it to the bit."""
        for fragment in fragments:
            weights, average = fragment.weights(), self.of(fragment)
            copied = weights.clone()
            weights.copy_(average)
            average.copy_(copied)
