"""A checkpoint in words."""

from __future__ import annotations

from math import prod

from vitscale.checkpoint.store import Checkpoint


def describe(checkpoint: Checkpoint) -> str:
    """Step, what the run said of itself, and tensors by kind: lines for a terminal."""
    tensors = checkpoint.tensors
    lines = [f"{checkpoint.folder}: whole, {len(checkpoint.files)} files, {sum(checkpoint.files.values()):,} bytes",
             f"  step: {checkpoint.step}"]
    lines += [f"  {name}: {value}" for name, value in checkpoint.state.items() if name != "step"]
    for kind in dict.fromkeys(kind for kind, _ in tensors):
        shapes = checkpoint.shapes(kind)
        types = ", ".join(sorted({dtype.name for (k, _), (_, dtype) in tensors.items() if k == kind}))
        elements = sum(prod(shape) for shape in shapes.values())
        lines.append(f"  {kind}: {len(shapes)} tensors, {elements:,} elements ({types})")
    return "\n".join(lines)
