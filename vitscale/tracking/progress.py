"""One line on the terminal: step, loss, lr, images/s, time left."""

from __future__ import annotations

from typing import Any, TextIO

from vitscale.text import TerminalLine, duration
from vitscale.tracking.jsonl import as_number

_SCORES = (
    "validation/loss", "validation/top1", "validation/map", "validation/mae", "evaluation/linear_probe",
    "evaluation/knn",
)  # fmt: skip


class Progress(TerminalLine):
    """Shows rows of metrics.jsonl: rewritten in place on a terminal, a line each where stderr is a file."""

    def __init__(self, total_steps: int, global_batch: int, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._total, self._batch = total_steps, global_batch

    def show(self, row: dict[str, Any]) -> None:
        """A row with `step`, `loss`, `lr` and `images_per_second`."""
        speed = as_number(row.get("images_per_second")) or 0.0
        left = (self._total - row["step"]) * self._batch / speed if speed > 0 else None
        text = (
            f"step {row['step']}/{self._total}  loss {_number(row.get('loss'), '.4f')}  "
            f"lr {_number(row.get('lr'), '.2e')}  {speed:,.0f} images/s  {duration(left)} left"
        )
        for key in _SCORES:
            text += f"  {key} {_number(row[key], '.4f')}" if key in row else ""
        for key in ("skipped_steps", "spikes", "bad_samples"):
            text += f"  {row[key]} {key.replace('_', ' ')}" if row.get(key) else ""
        if self._in_place:
            self.rewrite(text)
        else:
            self.say(text)


def _number(value: Any, style: str) -> str:
    number = as_number(value)
    return "?" if number is None else format(number, style)
