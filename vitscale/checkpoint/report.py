"""A checkpoint in words."""

from __future__ import annotations

from vitscale.checkpoint.store import Checkpoint


def describe(checkpoint: Checkpoint) -> str:
    """Step, what the run said of itself, and tensors by kind: lines for a terminal."""
    tensors = checkpoint.tensors
    lines = [f"{checkpoint.folder}: whole, {len(checkpoint.files)} files, {sum(checkpoint.files.values()):,} bytes",
             f"  step: {checkpoint.step}"]
    lines += [f"  {name}: {value}" for name, value in checkpoint.state.items() if name != "step"]
    for kind in dict.fromkeys(kind for kind, _ in tensors):
        ofkind = [(shape, dtype) for (k, _), (shape, dtype) in tensors.items() if k == kind]
        elements = 0
        for shape, _ in ofkind:
            size = 1
            for side in shape:
                size *= side
            elements += size
        types = ", ".join(sorted({dtype.name for _, dtype in ofkind}))
        lines.append(f"  {kind}: {len(ofkind)} tensors, {elements:,} elements ({types})")
    return "\n".join(lines)
