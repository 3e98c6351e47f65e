"""What a CPU can prove of code for a GPU: run on device `meta`, an operation of tensors on two devices is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
TRANSFERS = (aten._to_copy, aten.copy_)
INDEXING = (aten.index, aten.index_put, aten.index_put_)


class OneDevice(TorchDispatchMode):
    """Within it the tensors of an operation lie on one device (0-dimensional ones on the CPU aside, as on a GPU).

    Values change devices by copies alone. `meta` itself refuses what the host would have to wait for on
    a GPU (reading a value, sizes that depend on values), all but writing by a mask: that is refused here.
    `seen` counts the operations with a tensor on a device other than the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim or tensor.device.type != "cpu"}
        assert len(devices) <= 1 or func.overloadpacket in TRANSFERS, f"{func}: tensors on {sorted(devices)}"
        if devices - {"cpu"}:
            self.seen += 1
            indices = args[1] if func.overloadpacket in INDEXING else []
            masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func}: by a mask; the host would wait to know how many are true in it"
        return func(*args, **(kwargs or {}))
