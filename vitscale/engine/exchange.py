"""What the ranks tell each other of their steps: a few numbers beside the next step, details before a row or a save."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vitscale.engine.ranks import PendingSum, ProcessRanks


@dataclass(frozen=True)
class Consumed:
    """What a step's records need of a micro-batch after its forward: not its tensors."""

    names: Sequence[str]
    replaced: Sequence[Any]
    epoch: int
    retries: int


@dataclass(frozen=True)
class Agreement:
    """What all ranks together say of one step, the same on each of them."""

    step: int
    loss: float  # mean over the ranks, in no fixed order of adding
    wishes: frozenset[str]  # what any rank was asked for, say stop
    bad: dict[str, int]  # replaced samples by cause; every cause there is
    retries: int  # reads of storage that were made again


class StepExchange:
    """One small sum a step that runs beside the next step.

    Its methods are collectives: every rank calls them in the same order, `finish` before the next `start`.
    """

    def __init__(self, ranks: ProcessRanks, causes: Sequence[str]) -> None:
        self._ranks, self._causes = ranks, causes
        self._step = 0
        self._sum: PendingSum | None = None

    def start(
        self, step: int, loss: float, wishes: Mapping[str, bool], consumed: Sequence[Consumed], retries: int
    ) -> None:
        """Tell the others what this rank has to say of a step. retries: those beside the micro-batches' own."""
        bad = Counter(replaced.cause for micro_batch in consumed for replaced in micro_batch.replaced)
        values = {f"bad {cause}": bad[cause] for cause in self._causes}
        values |= {f"wish {name}": asked for name, asked in wishes.items()}
        retries += sum(micro_batch.retries for micro_batch in consumed)
        self._step, self._sum = step, self._ranks.start_sum(values | {"loss": loss, "retries": retries})

    def finish(self) -> Agreement | None:
        """What came of the last `start`, once all ranks are there; None where it was asked for already."""
        if self._sum is None:
            return None
        sums, self._sum = self._sum.finish(), None
        return Agreement(
            step=self._step,
            loss=sums["loss"] / self._ranks.world_size,
            wishes=frozenset(name.removeprefix("wish ") for name in sums if name.startswith("wish ") and sums[name]),
            bad={cause: int(sums[f"bad {cause}"]) for cause in self._causes},
            retries=int(sums["retries"]),
        )


class StepDetails:
    """The rows that steps leave beside metrics.jsonl, kept on each rank until all of them are written by rank 0."""

    def __init__(self, ranks: ProcessRanks, record: Callable[[str, dict[str, Any]], None], trace: bool) -> None:
        """record: (file, row) of a JSONL file, on rank 0; trace: whether every step's samples are named."""
        self._ranks, self._record, self._trace = ranks, record, trace
        self._pending: list[tuple[int, list[str], list[str], list[Any]]] = []  # step, files, names, replaced
        self._any = False  # whether any rank has a row to be written

    def add(self, step: int, consumed: Sequence[Consumed], applied: bool) -> None:
        """What this rank has of a step; `applied` is the same on all ranks."""
        files = ["trace.jsonl"] * self._trace + ["skipped.jsonl"] * (not applied)
        names = [name for micro_batch in consumed for name in micro_batch.names] if files else []
        replaced = [each for micro_batch in consumed for each in micro_batch.replaced]
        self._any |= bool(files)
        if files or replaced:
            self._pending.append((step, files, names, replaced))

    def expect(self) -> None:
        """The ranks have agreed that some of them have replaced samples."""
        self._any = True

    def write(self) -> None:
        """Write what is pending, in the order of steps and slots. A collective."""
        if not self._any:
            return
        local = [(step, files, names, [asdict(each) for each in bad]) for step, files, names, bad in self._pending]
        of_steps: dict[int, tuple[list[str], list[str], list[Any]]] = {}
        for step, files, names, replaced in itertools.chain(*self._ranks.collect(local)):
            of_step = of_steps.setdefault(step, (files, [], []))
            of_step[1].extend(names)
            of_step[2].extend(replaced)
        for step, (files, names, replaced) in sorted(of_steps.items()):
            for file in files:
                self._record(file, {"step": step, "sample_keys": names})
            for row in replaced:
                self._record("quarantine.jsonl", {"step": step, **row})
        self._pending, self._any = [], False

    def example(self) -> str:
        """One of the samples that were replaced and are not written yet, on whichever rank. A collective."""
        replaced = [each for _, _, _, bad in self._pending for each in bad]
        return next(filter(None, self._ranks.gather(str(replaced[0]) if replaced else None)))
