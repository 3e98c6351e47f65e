"""Limits on what may go wrong silently: skipped steps and replaced samples are counted and bounded.

Both counts are the same on all ranks, so all ranks raise at the same step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from statistics import median

from vitscale.errors import DataError, VitscaleError


class Diverged(VitscaleError):
    """Too many steps in a row had a gradient that was not finite, or a loss far above those before them."""

    def __init__(self, reason: str, first: int, last: int) -> None:
        """first, last: these steps."""
        super().__init__(reason)
        self.first, self.last = first, last


class StepGuard:
    """Counts steps whose gradient was not finite; `limit` in a row end the run."""

    def __init__(self, limit: int, skipped: int = 0, in_a_row: int = 0) -> None:
        """skipped, in_a_row: those before the first step that is noted, in all and up to it."""
        self.limit = limit
        self.skipped, self.in_a_row = skipped, in_a_row

    def note(self, step: int, applied: bool, before_end: Callable[[], object]) -> None:
        """Take one step's outcome; raises Diverged at the limit, `before_end` called."""
        if applied:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            before_end()
            raise Diverged(
                f"step {step}: the gradient was not finite in {self.in_a_row} steps in a row "
                f"(train.max_skipped_steps={self.limit}); the weights are as before them. Lower optimizer.lr, "
                "set optimizer.clip, or look at the sample keys in skipped.jsonl",
                step - self.in_a_row + 1,
                step,
            )


class SpikeGuard:
    """Finds losses far above those before them: above the median of the last WINDOW finite losses by `deviations`.

    A deviation is 1.4826 times the median distance from the median, which for normal noise is the standard deviation,
    or LEAST of the median where that is more. Losses of a spike join the window, so that a new level ends the alarm.
    """

    WINDOW, FEWEST, LEAST = 128, 32, 0.01
    LASTING = 3  # steps

    def __init__(
        self, deviations: float, losses: list[float], spikes: int = 0, in_a_row: int = 0, ends: bool = False
    ) -> None:
        """losses: the window; spikes, in_a_row: steps above the bound before the first that is noted; ends: whether a
        spike of LASTING steps raises."""
        self.deviations, self.losses, self.ends = deviations, losses, ends
        self.spikes, self.in_a_row = spikes, in_a_row

    def note(self, step: int, loss: float, before_end: Callable[[], object]) -> str | None:
        """Take one step's loss, over all ranks; a line where a spike begins. Raises Diverged, `before_end` called."""
        if not math.isfinite(loss):  # its gradient is not either: StepGuard's
            return None
        line = None
        if len(self.losses) >= self.FEWEST:
            middle = median(self.losses)
            spread = 1.4826 * median(abs(other - middle) for other in self.losses)
            bound = middle + self.deviations * max(spread, self.LEAST * abs(middle))
            if loss > bound:
                self.spikes += 1
                self.in_a_row += 1
            else:
                self.in_a_row = 0
            if self.ends and self.in_a_row == self.LASTING:
                before_end()
                raise Diverged(
                    f"step {step}: the loss is {loss:.4g}, above {bound:.4g} (guard.spike_deviations="
                    f"{self.deviations:g}) in {self.LASTING} steps in a row",
                    step - self.LASTING + 1,
                    step,
                )
            if self.in_a_row == 1:
                line = (
                    f"step {step}: the loss is {loss:.4g}, a spike: the last {len(self.losses)} had a median of "
                    f"{middle:.4g}, and guard.spike_deviations={self.deviations:g} allows {bound:.4g}"
                )
        self.losses.append(loss)
        del self.losses[: -self.WINDOW]
        return line


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
