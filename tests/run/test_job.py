"""A job before it runs, its periodic tasks, and what its end leaves in the folder."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vitscale.checkpoint.store import SoleRank
from vitscale.config.load import config_of
from vitscale.config.schema import Checkpoint, Data, Guard, Log, Model, Run, RunConfig, Source, Train
from vitscale.engine import digest
from vitscale.engine.loop import TrainState, every_n_steps
from vitscale.engine.room import Room
from vitscale.errors import ConfigError, StorageError
from vitscale.lease import FolderInUse, FolderLost, is_announced
from vitscale.run.job import Job
from vitscale.run.pretrain import pretrain, run_locked
from vitscale.run_folder import BAD_INPUT, DONE, FAILED, STOPPED
from vitscale.tracking.jsonl import JsonlFile
from vitscale.tracking.meters import Meters
from vitscale.world import World


def make_config(folder: Path, **sections: Any) -> RunConfig:
    return dataclasses.replace(
        RunConfig(), run=Run(dir=str(folder / "runs")), data=Data(train=(Source("/nowhere/*.tar"),)), **sections
    )


def test_making_a_job_does_no_io(tmp_path: Path) -> None:
    """Neither the run's folder nor shards nor a process group: all that begins with `run`."""
    made = Job(make_config(tmp_path), World(rank=1, world_size=2))
    assert made.folder.path == tmp_path / "runs" / "run"
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()


def test_rows_are_logged_and_synced_before_their_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on several ranks what they hold is compared before it is saved."""
    events: list[str] = []
    monkeypatch.setattr(digest, "compare", lambda step, tensors, ranks: events.append(f"compare {step}"))
    records: Any = SimpleNamespace(log=lambda row: events.append("log"), sync=lambda: events.append("sync"), say=None)
    saves: Any = SimpleNamespace(
        failures=0,
        due=every_n_steps(3),
        postpones=lambda is_best: False,
        run=lambda state: events.append(f"save {state.step}"),
    )
    guard, checkpoint = Guard(digest_every_steps=4), Checkpoint(every_steps=3)
    config = make_config(tmp_path, log=Log(every_steps=2), checkpoint=checkpoint, guard=guard)
    session: Any = SimpleNamespace(config=config, held_out=None, probed=None, ranks=SoleRank())
    engine: Any = SimpleNamespace(replicated=lambda: [], module=nn.Identity(), device=torch.device("cpu"))
    for ranks, compares in ((1, {}), (2, {"digest": [4]})):
        tasks = Job(config, World(world_size=ranks)).tasks(session, engine, records, Meters(), saves)
        for task in tasks:
            if task.due(6):
                task.run(TrainState(step=6), {})
        assert events == ["log", *(["compare 6"] if compares else []), "sync", "save 6"]
        events.clear()
        due = {task.name: [step for step in range(1, 7) if task.due(step)] for task in tasks}
        assert due == {"tracking": [2, 4, 6], **compares, "save": [3, 6]}
        assert [task.name for task in tasks if task.at_stop] == [*compares, "save"]


# ---- the end of a run


class Ending(Job):
    """A job whose run ends as it is told."""

    def __init__(self, folder: Path, end: Any, **world: Any) -> None:
        super().__init__(make_config(folder), World(**world))
        self.end = end

    def run(self) -> int:
        if isinstance(self.end, Exception):
            raise self.end
        return self.end()


def test_the_first_rank_that_fails_says_why(tmp_path: Path) -> None:
    error = ConfigError("model.x=1: must be 2")
    with pytest.raises(ConfigError):
        run_locked(Ending(tmp_path, error))
    failed = Job(make_config(tmp_path), World()).folder
    assert failed.read_exit() == {"code": BAD_INPUT, "step": None, "reason": "model.x=1: must be 2", "attempt": ""}
    assert not error.reported, "its line is printed by this rank"
    later = ConfigError("another rank is gone")
    with pytest.raises(ConfigError):
        run_locked(Ending(tmp_path, later, rank=1, world_size=2))
    assert later.reported, "nothing is printed"
    assert run_locked(Ending(tmp_path, ConnectionError("closed"), rank=1, world_size=2)) == BAD_INPUT
    assert failed.read_exit()["reason"] == "model.x=1: must be 2"


@pytest.mark.parametrize(("gpu_bytes", "says"), [(10**10, "this fits"), (10**8, "no ZeRO stage fits"), (None, "")])
def test_a_gpu_that_is_too_small_is_told_with_what_would_fit(tmp_path: Path, gpu_bytes: int | None, says: str) -> None:
    """gpu_bytes: None where it was not asked; the error is told nevertheless."""
    job = Ending(tmp_path, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    model = Model(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
    job.config = dataclasses.replace(job.config, model=model, train=Train(steps=9, micro_batch=32))
    job.room = None if gpu_bytes is None else Room(gpu_bytes, "of the GPU's memory")
    with pytest.raises(ConfigError, match=rf"train.micro_batch=32: does not fit.*{says}"):
        run_locked(job)
    exit_record = job.folder.read_exit()
    assert exit_record is not None
    assert exit_record["code"] == BAD_INPUT


def test_a_crash_is_raised_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_locked(Ending(tmp_path, ZeroDivisionError("by 0")))
    exit_record = Job(make_config(tmp_path), World()).folder.read_exit()
    assert exit_record == {"code": FAILED, "step": None, "reason": "ZeroDivisionError: by 0", "attempt": ""}


def test_a_fault_of_the_infrastructure_is_one_line_and_an_attempt_of_its_own(tmp_path: Path) -> None:
    """The error of the system becomes one that requeues; whoever starts the run again begins another attempt."""
    folder = Job(make_config(tmp_path), World()).folder
    for attempt in ("1", "2"):
        with pytest.raises(StorageError, match=r"^/runs/metrics\.jsonl: Input/output error"):
            run_locked(
                Ending(tmp_path, OSError(errno.EIO, "Input/output error", "/runs/metrics.jsonl"), attempt=attempt)
            )
        record = folder.read_exit()
        assert record is not None
        assert (record["code"], record["attempt"]) == (STOPPED, attempt)
    assert run_locked(Ending(tmp_path, lambda: DONE, attempt="3")) == DONE
    rows = JsonlFile(folder.attempts).rows()
    assert [(row["attempt"], row.get("code")) for row in rows] == [
        ("1", None),
        ("1", 3),
        ("2", None),
        ("2", 3),
        ("3", None),
    ]
    assert [row["ranks"] for row in rows if "began" in row] == [1, 1, 1]


@pytest.mark.parametrize("supervised", [False, True])
def test_what_an_earlier_start_left_is_cleared(tmp_path: Path, supervised: bool) -> None:
    """By the launcher, where there is one: what comes after it has cleared both counts."""
    folder = Job(make_config(tmp_path), World()).folder
    folder.write_exit(FAILED, None, "earlier")
    folder.stop.touch()
    folder.announce()

    def look() -> int:
        assert not is_announced(folder.path), "it has the folder now"
        assert (folder.read_exit() is not None) == folder.stop.exists() == supervised
        with pytest.raises(FolderInUse):
            run_locked(Ending(tmp_path, lambda: DONE))
        return DONE

    assert run_locked(Ending(tmp_path, look, supervised=supervised)) == DONE


@pytest.mark.parametrize("error", [ConnectionError("closed"), StorageError("a rank is gone")])
def test_a_run_that_lost_its_folder_writes_no_exit_record(tmp_path: Path, error: Exception) -> None:
    """Its ranks fail one after the other, and the record is that of the run which has the folder now."""
    folder = Job(make_config(tmp_path), World()).folder

    def lose() -> int:
        (folder.path / "lock-9").write_text("0000000001\nprocess 5 on far\nfar 5 5\n")
        raise error

    with pytest.raises(FolderLost, match="process 5 on far has taken the run"):
        run_locked(Ending(tmp_path, lose))
    assert folder.read_exit() is None
    assert folder.owner() == "process 5 on far"


def test_a_run_whose_folder_is_gone_says_so_and_makes_no_new_one(tmp_path: Path) -> None:
    folder = Job(make_config(tmp_path), World()).folder

    def move() -> int:
        folder.path.rename(tmp_path / "moved")
        raise FileNotFoundError(2, "No such file or directory", str(folder.metrics))

    with pytest.raises(FolderLost, match="the folder is gone: moved, removed"):
        run_locked(Ending(tmp_path, move))
    assert not folder.path.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("objective.classification.loss", "bce"), ("objective.classification.class_weights", "balanced"),
     ("objective.classification.head_std", 0.001),
     ("optimizer.layer_decay", 0.5), ("train.freeze", 1)],
)  # fmt: skip
def test_what_finetune_alone_reads_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    keys = ["data.train=shards/*.tar", f"run.dir={tmp_path}", "train.steps=1", "objective.name=classification"]
    config = config_of({}, [*keys, "model.num_labels=3", f"{key}={value}"])
    with pytest.raises(ConfigError, match=rf"{key}={value}: is for `vitscale finetune CONFIG`"):
        pretrain(config, World())
    assert not list(tmp_path.iterdir())
