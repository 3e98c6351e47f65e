"""Micro-batches on the device, the next one received, copied and augmented while the device works on the last."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vitscale.augment.operations import RaggedBatch
from vitscale.augment.pipeline import Augment


class NamedBatch(RaggedBatch, Protocol):
    """What the feed passes on of a batch beside its tensors: see data/batch.py."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def replaced(self) -> Sequence[Any]: ...
    @property
    def sample_ids(self) -> np.ndarray: ...
    @property
    def repeats(self) -> np.ndarray: ...
    @property
    def epoch(self) -> int: ...
    @property
    def retries(self) -> int: ...


_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context
B = TypeVar("B", bound=NamedBatch)


class Lender(Protocol[B]):
    """Where batches come from, in memories that are given back: see data/loader.py."""

    @property
    def memories(self) -> int: ...
    def ready(self) -> bool: ...
    def __next__(self) -> B: ...
    def release(self, batch: B) -> None: ...
    def memory(self, batch: B) -> tuple[int, np.ndarray]: ...


@dataclass(frozen=True)
class FedBatch:
    """A micro-batch as the loop wants it."""

    inputs: dict[str, Tensor]  # the model's keyword arguments, on the device
    names: tuple[str, ...]  # "shard/key" of each sample
    replaced: Sequence[Any]  # the bad samples that others stand in for
    epoch: int
    sample_ids: np.ndarray  # int64 [n]
    repeats: np.ndarray  # int64 [n]; an evaluation counts a sample where it is 0
    retries: int = 0  # reads of storage that were made again


class DeviceFeed(Generic[B]):
    """An iterator over the loader's batches, augmented on `device`; use it in a `with`, or close it.

    On a GPU copy and augmentation run on a stream of their own, and a batch goes back to the loader
    once that stream has passed it. Without one the same calls do the same, one after the other.
    """

    def __init__(self, loader: Lender[B], augment: Augment, device: torch.device) -> None:
        self._loader, self._augment = loader, augment
        self._streams: _OneStream | _TwoStreams = _TwoStreams(device) if device.type == "cuda" else _OneStream()
        self._ahead: tuple[FedBatch, Any] | Exception | None = None  # what run_ahead has for the next next()
        self._lent: deque[tuple[B, Any]] = deque()  # batches, oldest first, each with the mark after its last use
        self._spans: dict[str, deque[tuple[Any, Any]]] = {"data": deque(), "augment": deque()}
        self._seconds = dict.fromkeys(self._spans, 0.0)

    def __iter__(self) -> DeviceFeed[B]:
        return self

    def __next__(self) -> FedBatch:
        ahead, self._ahead = self._ahead or self._start(), None
        if isinstance(ahead, Exception):
            raise ahead
        fed, ready = ahead
        before = self._streams.mark()
        self._streams.hand_over(ready, fed.inputs.values())
        self._spans["data"].append((before, self._streams.mark()))
        return fed

    def run_ahead(self) -> None:
        """Start on the next micro-batch if the loader has it; call this when work for the device is queued.

        What goes wrong with that batch, or that there is none, is kept for the `next()` that asks for it.
        A slow loader is waited for there alone, so that it never holds up the step that is under way.
        """
        if self._ahead is not None:
            return
        try:
            self._release()
            if self._loader.ready():
                self._ahead = self._start()
        except Exception as error:
            self._ahead = error

    def read_seconds(self) -> dict[str, float]:
        """Seconds since the last call: "data", that the step waited for its batches, and "augment".

        On a CPU the first is the time in which the loader was waited for. On a GPU it is the time in
        which the stream that computes had nothing to do for want of a batch, and "augment" is the time
        of the other stream, beside it; what the device has not reached yet comes with a later call.
        """
        self._settle()
        seconds, self._seconds = self._seconds, dict.fromkeys(self._spans, 0.0)
        return seconds

    def close(self) -> None:
        """Wait for what was begun. Batches given out stay."""
        self._streams.close()

    def __enter__(self) -> DeviceFeed[B]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> tuple[FedBatch, Any]:
        """The next batch, and the mark from which on its tensors are there."""
        streams = self._streams
        self._settle()
        # The marks lie on the computing stream: between them is what it stood still while this waits here.
        before = streams.mark()
        self._release()
        if len(self._lent) == self._loader.memories:  # the reader has nothing to fill
            streams.wait(self._lent[0][1])
            self._release()
        batch = next(self._loader)
        self._spans["data"].append((before, streams.mark()))
        streams.pin(*self._loader.memory(batch))
        with streams.ahead():
            began = streams.mark()
            inputs = self._augment(batch).inputs()
            ready = streams.mark()
        self._spans["augment"].append((began, ready))
        self._lent.append((batch, ready))
        self._release()
        return FedBatch(
            inputs, batch.names, batch.replaced, batch.epoch, batch.sample_ids, batch.repeats, batch.retries
        ), ready

    def _release(self) -> None:
        """Give back the batches that the device is done with."""
        while self._lent and self._streams.passed(self._lent[0][1]):
            self._loader.release(self._lent.popleft()[0])

    def _settle(self) -> None:
        """Count the spans whose end has passed."""
        for what, spans in self._spans.items():
            while spans and self._streams.passed(spans[0][1]):
                self._seconds[what] += self._streams.seconds(*spans.popleft())


class _OneStream:
    """Without a GPU: whatever was called is done, and a mark is a time."""

    def ahead(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def hand_over(self, ready: float, tensors: Iterable[Tensor]) -> None:
        pass

    def pin(self, number: int, memory: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


class _TwoStreams:
    """On a GPU: the stream that computes, which is torch's current one, and one for what runs ahead of it.

    A mark is an event, on the stream that is current where it is made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._side.wait_stream(torch.cuda.current_stream(device))  # for what the augmentation was made with
        self._pinned: dict[int, np.ndarray] = {}
        self._pins = True

    def ahead(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._side)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        return first.elapsed_time(last) / 1000

    def hand_over(self, ready: torch.cuda.Event, tensors: Iterable[Tensor]) -> None:
        """Let the current stream use tensors of the other one, from `ready` on; their memory lasts until it has."""
        compute = torch.cuda.current_stream(self._device)
        compute.wait_event(ready)
        for tensor in tensors:
            tensor.record_stream(compute)

    def pin(self, number: int, memory: np.ndarray) -> None:
        """Pin a memory in place, so that copies from it run beside the host; nothing may be read from it now.

        One that grew is another array: the old one is let go first. Where pinning fails, copies
        still are right: each is over when its call returns.
        """
        if not self._pins or self._pinned.get(number) is memory:
            return
        self._unpin(number)
        error = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE)
        if int(error) == 0:
            self._pinned[number] = memory
            return
        self._pins = False
        with contextlib.suppress(RuntimeError):  # CUDA tells the same error once more, with the next kernel
            torch.zeros(1, device=self._device)
        print(
            f"feed: {memory.nbytes >> 20} MiB cannot be pinned (CUDA error {int(error)}): batches are copied to the "
            "GPU while the host waits",
            file=sys.stderr,
            flush=True,
        )

    def _unpin(self, number: int) -> None:
        memory = self._pinned.pop(number, None)
        if memory is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data))

    def close(self) -> None:
        self._side.synchronize()
        for number in list(self._pinned):
            self._unpin(number)
