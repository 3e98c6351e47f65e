"""A spy on what a host would wait for a GPU for, seen on a CPU: values and sizes that Python asks tensors for."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = Path(torch.__file__).parents[1]
aten = torch.ops.aten
# What they return, or how much of it, depends on values.
_READ = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select,
    aten.unique_dim, aten.unique_consecutive, aten._unique, aten._unique2, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_MOVED = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}  # on a CPU no operation of torch's
_FROM_PYTHON = {torch.tensor, torch.as_tensor}  # with a `device`: copied to it, and waited for


class HostSyncs:
    """A context, which may be entered in one function and left in another; `found` counts (file, function, what).

    file, function: of the innermost code that is not torch's own, but for torch.optim; file: below this repository or
    the folder of packages.
    """

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str, str]] = Counter()
        self._modes = (_Operations(self.found), _Calls(self.found))

    def __enter__(self) -> HostSyncs:
        self._threads = torch.autograd.is_multithreading_enabled()
        torch.autograd.set_multithreading_enabled(False)  # a backward in a thread of its own would not be seen
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        torch.autograd.set_multithreading_enabled(self._threads)


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[tuple[str, str, str]]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket
        indices = args[1] if operation in _INDEXING else []
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if operation in _READ or by_mask:
            self._found[(*_caller(), operation.__name__)] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, found: Counter[tuple[str, str, str]]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_the_cpu = func is Tensor.to and "cpu" in (*args[1:], *kwargs.values())
        if func in _MOVED or to_the_cpu or (func in _FROM_PYTHON and kwargs.get("device") is not None):
            self._found[(*_caller(), func.__name__)] += 1
        return func(*args, **kwargs)


def _caller() -> tuple[str, str]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        for root in (_PACKAGES, _ROOT):
            if file.is_relative_to(root) and file != Path(__file__):
                below = file.relative_to(root)
                if below.parts[0] != "torch" or below.parts[1] == "optim":
                    return str(below), frame.f_code.co_name
                break  # the packages may lie below this repository
        frame = frame.f_back
    return "", ""
