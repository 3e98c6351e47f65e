"""Rows of text as columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """The rows below each other, every column as wide as its widest cell; `right`: places of those set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:{'>' if place in right else '<'}{widths[place]}}" for place, cell in enumerate(row))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
