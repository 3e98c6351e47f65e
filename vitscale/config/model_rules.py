"""What a ViT's keys must satisfy, whoever gives them: a run's config, config.json or a Python caller."""

from __future__ import annotations

Size = int | tuple[int, int]  # a square's side, or (height, width)


def pair(value: Size) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (value, value) if isinstance(value, int) else value
