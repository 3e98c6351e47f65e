"""A job before it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch.distributed as dist

from vitscale.config.schema import Data, Run, RunConfig, Source
from vitscale.run.job import Job
from vitscale.world import World


def test_making_a_job_does_no_io(tmp_path: Path) -> None:
    """Neither the run's folder nor shards nor a process group: all that begins with `run`."""
    config = dataclasses.replace(
        RunConfig(), run=Run(dir=str(tmp_path / "runs")), data=Data(train=(Source("/nowhere/*.tar"),))
    )
    job = Job(config, World(rank=1, world_size=2))
    assert job.folder.path == tmp_path / "runs" / "run"
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()
