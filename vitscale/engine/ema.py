"""A moving average of the weights, for evaluation and for the exported model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitscale.engine.zero_state import Fragment


class Ema:
    """fp32 averages beside the master weights, laid out as they are: ema = decay x ema + (1 - decay) x weights."""

    def __init__(self, flats: Sequence[torch.Tensor], decay: float) -> None:
        """Start from the weights. flats: the tensors that the optimizer steps."""
        self.decay = decay
        self._weights = [flat.detach() for flat in flats]
        self._averages = [weights.clone() for weights in self._weights]
        self._by_flat = dict(zip(flats, self._averages, strict=True))

    def update(self) -> None:
        """Take one step's new weights in."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)

    def of(self, fragment: Fragment) -> torch.Tensor:
        """The averages of a fragment's elements, a 1-D view."""
        return fragment.within(self._by_flat[fragment.flat])

    def exchange(self, fragments: Sequence[Fragment]) -> None:
        """Put the averages where the master weights are and those here; a second time undoes it to the bit."""
        for fragment in fragments:
            weights, average = fragment.weights(), self.of(fragment)
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
