"""Forwards without training, on all ranks alike: what an Engine and a model that every rank holds whole share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from vitscale import heartbeat
from vitscale.engine.ema import Ema
from vitscale.engine.ranks import ProcessRanks

Inputs = Mapping[str, torch.Tensor]


class HasInputs(Protocol):
    """A micro-batch, whatever else it carries (ids, names)."""

    @property
    def inputs(self) -> Inputs:
        """The model's keyword arguments, on the device."""


T = TypeVar("T", bound=HasInputs)
Measure = Callable[[Any, T], Mapping[str, torch.Tensor]]  # (the model's output, the micro-batch)


class Evaluable(Protocol):
    """A model that can be scored: see Engine."""

    ranks: ProcessRanks
    ema: Ema | None

    @property
    def device(self) -> torch.device: ...
    def evaluate(
        self,
        batches: Iterable[T],
        forwards: int,
        measure: Measure[T],
        average: bool = True,
        forward: Callable[[Any, T], Any] | None = None,
    ) -> dict[str, float]: ...


class WholeModel:
    """A model, in evaluation mode on `device`, that every rank holds whole and none trains."""

    ema: Ema | None = None

    def __init__(self, model: nn.Module, ranks: ProcessRanks, device: torch.device) -> None:
        self.model, self.ranks, self._device = model.to(device).eval(), ranks, device

    @property
    def device(self) -> torch.device:
        return self._device

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[T],
        forwards: int,
        measure: Measure[T],
        average: bool = True,
        forward: Callable[[Any, T], Any] | None = None,
    ) -> dict[str, float]:
        """As Engine.evaluate."""

        def run(batch: T) -> Any:
            return self.model(**batch.inputs) if forward is None else forward(self.model, batch)

        return self.ranks.sum(sum_measures(batches, forwards, run, measure, self.ranks.check_stop))


def sum_measures(
    batches: Iterable[T],
    forwards: int,
    run: Callable[[T], Any],
    measure: Measure[T],
    check_stop: Callable[[], None],
) -> dict[str, float]:
    """This rank's sums by name of `measure(run(batch), batch)`, over exactly `forwards` calls of `run`.

    check_stop: called before each of them, and may raise. A rank whose batches end before that repeats its last one,
    which is not counted again; it needs at least one.
    """
    source, last = iter(batches), None
    sums: dict[str, torch.Tensor] = {}
    for _ in range(forwards):
        check_stop()
        heartbeat.beat()
        fresh = next(source, None)
        last = last if fresh is None else fresh
        assert last is not None, "a rank without a batch cannot take part in an evaluation"
        output = run(last)
        for name, value in ({} if fresh is None else measure(output, last)).items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
    return {name: float(value) for name, value in sums.items()}
