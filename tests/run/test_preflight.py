"""What a rank looks at before a run, and how the faults of many are told."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.makers import write_shards
from tests.files.buckets import cloud, refusal
from vitscale.config.schema import Checkpoint, Data, RunConfig
from vitscale.data.index import build_index
from vitscale.errors import LaunchError, StorageError
from vitscale.run import preflight
from vitscale.run.preflight import Problem, RankReport, faults, require_ready
from vitscale.world import World

COMMON = {"config": "a", "version of torch": "2.13.0"}


class Gathered:
    """Ranks whose reports are these."""

    def __init__(self, reports: list[RankReport]) -> None:
        self.reports = reports

    def gather(self, own: RankReport) -> list[RankReport]:
        return self.reports


def test_all_faults_of_all_ranks_are_told_at_once() -> None:
    broken = Problem("cannot write to /r/checkpoints: Read-only file system; set run.dir")
    reports = [
        RankReport(COMMON, host="node1"),
        RankReport(COMMON, [broken], host="node2"),
        RankReport(COMMON | {"config": "b"}, [broken], host="node2"),
    ]
    assert [problem.text for problem in faults(reports)] == [
        f"ranks 1, 2 on node2 {broken.text}",
        "rank 2 on node2 has another config (b) than rank 0 on node1 (a): start all ranks with one command, from one "
        "environment, on one shared folder",
    ]
    ranks: Any = Gathered(reports)
    with pytest.raises(LaunchError, match=r"^preflight: ranks 1, 2 on node2 cannot write .*; rank 2 on node2 has an"):
        require_ready(ranks, reports[0])


def test_storage_that_fails_for_a_while_requeues_unless_there_is_more() -> None:
    passing, lasting = Problem("cannot read /d/a.tar: Stale file handle", may_pass=True), Problem("sees another file")
    here = RankReport(COMMON)
    for problems, kind in (([passing], StorageError), ([passing, lasting], LaunchError)):
        ranks: Any = Gathered([here, replace(here, problems=problems)])
        with pytest.raises(kind):
            require_ready(ranks, here)


def test_what_a_rank_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [2, 2])
    paths = [tmp_path / "s000.tar", tmp_path / "s001.tar"]
    index, folder = build_index([str(path) for path in paths]), tmp_path / "run" / "checkpoints"
    config = RunConfig(data=Data(patience_s=1.0))

    def found(rank: int) -> list[str]:
        return [problem.text for problem in preflight.problems(config, World(rank, 4), folder, index)]

    assert [found(rank) for rank in range(4)] == [[]] * 4
    assert not list(folder.iterdir())
    with open(paths[1], "ab") as stream:
        stream.write(b"\0" * 512)
    assert found(0) == []
    (text,) = found(3)
    assert text.startswith(f"sees another file than rank 0 at {paths[1]}: {paths[1].stat().st_size} bytes, not ")
    paths[1].unlink()
    folder.rmdir()
    folder.touch()  # where the folder should be
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        data, write, signals = found(1)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    assert data.startswith(f"cannot read data.train: {paths[1]}: No such file")
    assert write.startswith(f"cannot write to {folder}: ")
    assert "SIGTERM" in signals


@pytest.mark.parametrize(("code", "may_pass"), [("RequestTimeTooSkewed", True), ("ExpiredToken", False)])
def test_what_is_wrong_with_one_node_alone_is_told_by_its_ranks(code: str, may_pass: bool) -> None:
    pytest.importorskip("obstore")
    with cloud("s3") as web:
        web.files["/images/a.tar"] = b"x" * 1000
        web.faults["/images/a.tar"] = [refusal(403, code)] * 2
        problem = preflight.data_problem("s3://images/a.tar", 1000, RunConfig())
        assert problem is not None
        assert problem.text.startswith(f"cannot read data.train: s3://images/a.tar: {code}: ")
        assert problem.may_pass == may_pass
        assert preflight.data_problem("s3://images/a.tar", 1000, RunConfig()) is None


def test_versions_and_a_digest_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vitscale"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "room" / "a.py").write_text("1\n")
    monkeypatch.setattr("vitscale.__file__", str(package / "__init__.py"))
    before = preflight.code_digest()
    (package / "room" / "__pycache__").mkdir()
    (package / "room" / "__pycache__" / "a.pyc").write_text("compiled")
    assert preflight.code_digest() == before
    (package / "room" / "a.py").write_text("2\n")
    assert preflight.versions()["code of vitscale"] != before


def test_too_little_room_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    config = RunConfig(checkpoint=Checkpoint(keep=2))
    assert preflight.room_warning(config, folder, 1000) is None
    text = preflight.room_warning(config, folder, 10**15)
    assert text is not None
    assert "checkpoint.keep=2 checkpoints and one more take 36000000.0 GB further" in text
    assert not folder.exists()
