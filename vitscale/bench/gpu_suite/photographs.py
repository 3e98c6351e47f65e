"""The suite's images: JPEGs as large as photographs, in shards."""

from __future__ import annotations

import os
from pathlib import Path

from vitscale.bench.gpu_suite.cases import Setting
from vitscale.bench.photographs import photograph_shards


def photographs(setting: Setting) -> Path:
    """A folder of shards, made once a call: 20,000 JPEGs of 500x375, 256 distinct ones (on a CPU 256, 8 distinct)."""
    folder = setting.scratch / "photographs"
    if not folder.exists():
        draft = folder.with_name(f"photographs.{os.getpid()}")  # a process that is ended leaves no half of it
        images, distinct = (256, 8) if setting.tiny else (20_000, 256)
        photograph_shards(draft, images, distinct, shards=8)
        draft.rename(folder)
    return folder
