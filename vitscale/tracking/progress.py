"""One line on the terminal: step, loss, lr, images/s, time left."""

from __future__ import annotations

import shutil
import sys
from typing import Any, TextIO

from vitscale.tracking.jsonl import as_number


class TerminalLine:
    """A line that is rewritten in place on a terminal, and other lines that do not tear it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._shown = False

    def rewrite(self, text: str) -> None:
        """What the line shows from now on, cut to the terminal's width."""
        text = text[: max(shutil.get_terminal_size().columns - 1, 20)]
        self._write(f"\r{text}\x1b[K")
        self._shown = True

    def say(self, text: str) -> None:
        """Another line, without tearing the one that is shown."""
        self.close()
        self._write(f"{text}\n")

    def close(self) -> None:
        """Leave the shown line as it is and go below it."""
        if self._shown:
            self._write("\n")
            self._shown = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Progress(TerminalLine):
    """Shows rows of metrics.jsonl: rewritten in place on a terminal, a line each where stderr is a file."""

    def __init__(self, total_steps: int, global_batch: int, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._total, self._batch = total_steps, global_batch

    def show(self, row: dict[str, Any]) -> None:
        """A row with `step`, `loss`, `lr` and `images_per_second`."""
        speed = as_number(row.get("images_per_second")) or 0.0
        left = (self._total - row["step"]) * self._batch / speed if speed > 0 else None
        text = (f"step {row['step']}/{self._total}  loss {_number(row.get('loss'), '.4f')}  "
                f"lr {_number(row.get('lr'), '.2e')}  {speed:,.0f} images/s  {duration(left)} left")
        for key in ("skipped_steps", "bad_samples"):
            text += f"  {row[key]} {key.replace('_', ' ')}" if row.get(key) else ""
        if self._in_place:
            self.rewrite(text)
        else:
            self.say(text)


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 42s, 7m05s, 3h20m, 2d04h."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _number(value: Any, style: str) -> str:
    number = as_number(value)
    return "?" if number is None else format(number, style)
