"""What torch.compile has made, kept in the run's folder: the next start, on another node too, need not compile again.

A file for each rank of the first node, since the number of a GPU may be part of a key; a rank of another node reads the
one of its own place there. It is code that is executed, of whoever can write the run's folder.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vitscale.files.atomic import replaced
from vitscale.text import to_stderr
from vitscale.world import World


def load_compiled(folder: Path, world: World) -> None:
    """Give torch.compile what an earlier start of this run kept; nothing where there is none, or of another torch."""
    path = _path(folder, world)
    if path.exists():
        torch.compiler.load_cache_artifacts(path.read_bytes())


def keep_compiled(folder: Path, world: World) -> None:
    """Keep what was compiled or loaded so far."""
    if world.rank >= world.local_world_size or (made := torch.compiler.save_cache_artifacts()) is None:
        return
    path, (content, _) = _path(folder, world), made
    if not path.exists() or path.stat().st_size != len(content):
        try:
            with replaced(path) as draft:
                draft.write_bytes(content)
        except OSError as error:  # the next start compiles, that is all
            to_stderr(f"{path}: cannot be written ({error.strerror}); the next start compiles anew")


def _path(folder: Path, world: World) -> Path:
    return folder / f"compile_cache-{world.local_rank}.bin"
