"""Limits on what may go wrong silently: skipped steps and replaced samples are counted and bounded.

Both counts are the same on all ranks, so all ranks raise at the same step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from vitscale.errors import DataError


class Diverged(RuntimeError):
    """Too many steps in a row had a gradient that was not finite."""


class StepGuard:
    """Counts steps whose gradient was not finite; `limit` in a row end the run."""

    def __init__(self, limit: int, skipped: int = 0) -> None:
        self.limit = limit
        self.skipped = skipped
        self._in_a_row = 0

    def note(self, step: int, applied: bool) -> None:
        """Take one step's outcome; raises Diverged at the limit."""
        if applied:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            raise Diverged(
                f"step {step}: the gradient was not finite in {self._in_a_row} steps in a row "
                f"(train.max_skipped_steps={self.limit}); the weights are as before them. Lower optimizer.lr, "
                "set optimizer.clip, or look at the sample keys in skipped.jsonl"
            )


class SampleGuard:
    """Counts replaced samples by cause; more than max(3, fraction x samples) end the run."""

    def __init__(self, max_fraction: float, counts: dict[str, int]) -> None:
        self.max_fraction = max_fraction
        self.counts = Counter(counts)

    def note(self, causes: Iterable[str] | Mapping[str, int], samples: int, example: Callable[[], str]) -> None:
        """Take the causes of replaced samples, one each or counted, of all ranks; raises DataError at the limit.

        `samples`: consumed so far, these included; `example`: one of these samples and what it is replaced for, asked
        for at the limit, by all ranks.
        """
        self.counts += Counter(causes)  # leaves causes out that were counted 0 times
        bad = sum(self.counts.values())
        if bad > max(3, self.max_fraction * samples):
            by_cause = ", ".join(f"{count} {cause}" for cause, count in self.counts.most_common())
            raise DataError(
                f"{bad} bad samples ({by_cause}) among {samples} consumed: more than "
                f"data.max_bad_fraction={self.max_fraction}; one of them is {example()}; quarantine.jsonl names them, "
                "and `vitscale stats` all of the data's: leave them out of the shards, or raise it"
            )
