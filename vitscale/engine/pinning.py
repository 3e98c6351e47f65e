"""Host memory that a GPU copies into at full speed."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from vitscale.checkpoint.fragments import Reserve

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


class Pinned:
    """Pins the memory of snapshots, once for as long as it stays the same; does nothing for a CPU.

    Where memory cannot be pinned (ulimit -l), copies into it are slower.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: np.ndarray | None = None

    def reserve(self, reserve: Reserve, count: int) -> np.ndarray:
        """The memory that `reserve` gives, pinned."""
        memory = reserve(count)
        if self._device.type == "cuda" and memory is not self._memory:
            self.close()
            if int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE)) == 0:
                self._memory = memory
            else:
                with contextlib.suppress(RuntimeError):  # CUDA tells the same error once more, with the next kernel
                    torch.zeros(1, device=self._device)
        return memory

    def close(self) -> None:
        """Let go of it."""
        if self._memory is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._memory.ctypes.data))
            self._memory = None
