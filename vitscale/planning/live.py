"""How many bytes of tensors are alive, by watching every operation of torch: on real tensors and on fake ones alike."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context in which the bytes of all tensors that operations return are counted, for as long as they live.

    `live` and `peak` are of this thread's operations, those of a backward among them; what a kernel needs within
    itself does not show. `made` are the bytes of all that was ever made, `operations` counts what made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.made = self.operations = 0
        self._sizes: dict[int, int] = {}  # by storage

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            if tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.made += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key)

    def start_again(self) -> None:
        """Forget what was counted, but for what is alive."""
        self.peak, self.made, self.operations = self.live, 0, 0

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.hold(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result
