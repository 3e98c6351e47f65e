"""How attempts end, and how often a run is started again: real processes in the place of ranks."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from vitscale.errors import LaunchError
from vitscale.launch import torchrun
from vitscale.launch.attempts import begin, conclude, end, ending, next_attempt, restarts_here
from vitscale.launch.torchrun import Layout, describe_exit, main, supervise
from vitscale.run_folder import BAD_INPUT, DONE, FAILED, STOP_REASON, STOPPED, STOPPED_EARLY, RunFolder
from vitscale.tracking.jsonl import JsonlFile

DIE = "import os; os.kill(os.getpid(), 9)"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "r").mkdir()
    return RunFolder(tmp_path / "r", "1")


def words_of(folder: RunFolder) -> list[str]:
    """What starts a run: the watchdog reads its limits in the config."""
    config = folder.path.parent / "config.yaml"
    config.write_text("{}")
    return ["pretrain", str(config)]


def has_rank(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the launcher's one rank run this Python."""
    monkeypatch.setattr(Layout, "command", lambda self, arguments: [sys.executable, "-S", "-c", code])


@pytest.mark.parametrize(
    ("begun", "record", "rank", "code", "words"),
    [
        (True, None, DIE, 3, "ended from outside"),
        (False, None, DIE, 1, "before the run began"),
        (False, None, "raise SystemExit(2)", 2, "see above"),
        (True, (2, "x=1"), DIE, 2, "error: x=1"),
        (True, (3, "another rank is gone"), "raise SystemExit(3)", 3, "ended by the infrastructure: another"),
    ],
)
def test_the_code_of_a_rank_that_ends(
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    begun: bool,
    record: tuple[int, str] | None,
    rank: str,
    code: int,
    words: str,
) -> None:
    """begun: whether it had entered the run; record: what it said of its end."""
    has_rank(monkeypatch, rank)
    if begun:
        begin(folder, ranks=1, most_restarts=3)
    if record is not None:
        folder.write_exit(record[0], None, record[1])
    assert supervise(words_of(folder), Layout(), folder) == code
    assert words in describe_exit(folder)


def end_attempt(folder: RunFolder, code: int, reason: str, saves: int | None = None) -> int:
    """The exit code of one more attempt, of which two restarts are allowed."""
    attempt = RunFolder(folder.path, next_attempt(folder, nodes=2))
    attempt.clear_exit()
    begin(attempt, ranks=2, most_restarts=2)
    if saves is not None:
        (folder.checkpoints / f"step_{saves:08d}").mkdir(parents=True)
    attempt.write_exit(code, None, reason)
    return conclude(attempt, code)


def test_restarts_without_progress_are_bounded_and_told(folder: RunFolder) -> None:
    """A new checkpoint, or a stop on request, begins the count anew."""
    for reason, saves in (("EIO", None), ("EIO", None), ("EIO", 5), ("EIO", None), ("EIO", None), (STOP_REASON, None),
                          ("EIO", None), ("EIO", None)):  # fmt: skip
        assert end_attempt(folder, STOPPED, reason, saves) == STOPPED
    assert end_attempt(folder, STOPPED, "a rank is gone") == FAILED
    record = folder.read_exit()
    assert record is not None
    assert (record["code"], record["attempt"]) == (FAILED, "9")
    for words in ("3 attempts in a row", "parallel.restarts_without_progress=2", "checkpoint.every_steps", "is gone"):
        assert words in record["reason"]
    assert end_attempt(folder, STOPPED, "EIO") == STOPPED, "whoever gives the command again has mended something"
    assert end_attempt(folder, DONE, "done", saves=9) == DONE
    rows = JsonlFile(folder.attempts).rows()
    assert [row["attempt"] for row in rows] == [str(number) for number in range(1, 12) for _ in range(2)]
    assert [row.get("code") for row in rows[14:]] == [None, 3, None, 1, None, 3, None, 0]


def test_attempts_that_all_died_with_their_launchers_are_bounded(folder: RunFolder) -> None:
    """No launcher lived to count them: the next start does, once."""
    for number in (1, 2):
        begin(RunFolder(folder.path, str(number)), ranks=1, most_restarts=1, bounded=True)
    third = RunFolder(folder.path, "3")
    with pytest.raises(LaunchError, match=r"2 attempts in a row ended.*restarts_without_progress=1"):
        begin(third, ranks=1, most_restarts=1, bounded=True)
    end(third, BAD_INPUT, "2 attempts in a row")
    begin(RunFolder(folder.path, "4"), ranks=1, most_restarts=1, bounded=True)


def test_attempts_that_ended_with_their_launcher_count(folder: RunFolder) -> None:
    for number in range(3):
        last = RunFolder(folder.path, next_attempt(folder, nodes=2))
        assert last.attempt == str(number + 1)
        begin(last, ranks=2, most_restarts=2)
    assert ending(last, patience_s=0) == STOPPED
    assert conclude(last, STOPPED) == FAILED
    assert conclude(last, STOPPED) == FAILED, "as another node's launcher has said"
    assert len(JsonlFile(folder.attempts).rows()) == 4


# Enters the run, as `begin` does, and saves a checkpoint in its second attempt.
RANK = """
import json, os
attempt, folder = os.environ["VITSCALE_ATTEMPT"], FOLDER
row = {"attempt": attempt, "began": "", "step": int(attempt[0] > "2"), "restarts_without_progress": 9}
with open(f"{folder}/attempts.jsonl", "a") as stream:
    print(json.dumps(row), file=stream)
if attempt[0] == "2":
    os.makedirs(f"{folder}/checkpoints/step_00000001")
"""


def test_restarts_in_place(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As often as RESTARTS says without a new checkpoint, then out with code 3; not where it is to stop."""
    config = tmp_path / "c.yaml"
    config.write_text(f"{{run: {{name: r, dir: {tmp_path}}}, train: {{global_batch: 8, micro_batch: 2, steps: 3}}}}")
    monkeypatch.setattr(torchrun, "keep_snapshot", lambda *_: None)
    for name, value in {"CUDA_VISIBLE_DEVICES": "", "NPROC_PER_NODE": "1", "RESTARTS": "1"}.items():
        monkeypatch.setenv(name, value)
    rank = RANK.replace("FOLDER", repr(str(folder.path)))
    has_rank(monkeypatch, rank + DIE)
    assert main(["pretrain", str(config)]) == STOPPED
    assert [row["step"] for row in JsonlFile(folder.attempts).rows()] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert capsys.readouterr().err.count("starts the ranks again") == 3
    has_rank(monkeypatch, f"{rank}open({str(folder.stop)!r}, 'w').close(); {DIE}")
    monkeypatch.setenv("RESTARTS", "100")
    assert main(["pretrain", str(config)]) == STOPPED
    assert restarts_here(RunFolder(folder.path), 100), "but for the stop file"
    has_rank(monkeypatch, "raise SystemExit(1)")
    assert main(["pretrain", str(config)]) == FAILED
    assert "starts the ranks again" not in capsys.readouterr().err
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("RDZV_ENDPOINT", "n1:15000")
    assert main(["pretrain", str(config)]) == 2
    assert "RESTARTS=100: is for one node" in capsys.readouterr().err


def test_starts_that_are_stopped_before_their_first_step_are_bounded(folder: RunFolder) -> None:
    """As by a time limit that a start does not fit into: it would be requeued for ever."""
    for reason in (STOPPED_EARLY, STOP_REASON, STOPPED_EARLY, "EIO"):
        assert end_attempt(folder, STOPPED, reason) == STOPPED
    assert end_attempt(folder, STOPPED, STOPPED_EARLY) == FAILED
    record = folder.read_exit()
    assert record is not None
    for words in ("3 attempts in a row", "before their first step", "a longer time limit"):
        assert words in record["reason"]


ROLLS_BACK = """
with open(f"{folder}/exit.json", "w") as stream:
    json.dump({"attempt": attempt, "code": 3, "step": None, "reason": "rolled back to step 0, and ..."}, stream)
raise SystemExit(3)
"""


def test_a_run_that_rolled_back_is_started_again_in_place(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However often: it bounds that itself."""
    config = tmp_path / "c.yaml"
    config.write_text(f"{{run: {{name: r, dir: {tmp_path}}}, train: {{global_batch: 8, micro_batch: 2, steps: 3}}}}")
    monkeypatch.setattr(torchrun, "keep_snapshot", lambda *_: None)
    for name, value in {"CUDA_VISIBLE_DEVICES": "", "NPROC_PER_NODE": "1", "RESTARTS": "1"}.items():
        monkeypatch.setenv(name, value)
    has_rank(monkeypatch, f"{RANK.replace('FOLDER', repr(str(folder.path)))}if attempt[0] > '4': {DIE}\n{ROLLS_BACK}")
    assert main(["pretrain", str(config)]) == STOPPED
    assert len(JsonlFile(folder.attempts).rows()) == 12, "four rollbacks, two deaths"
    assert capsys.readouterr().err.count("starts the ranks again") == 5
    monkeypatch.setenv("RESTARTS", "0")
    has_rank(monkeypatch, RANK.replace("FOLDER", repr(str(folder.path))) + ROLLS_BACK)
    assert main(["pretrain", str(config)]) == STOPPED
    assert "starts the ranks again" not in capsys.readouterr().err


def test_a_start_that_came_second_is_refused_and_leaves_the_first_one_alone(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both had found the folder free; a torchrun says 1 for what its ranks end with."""
    config = tmp_path / "config.yaml"
    config.write_text(f"run: {{dir: {tmp_path}, name: r}}")

    def first_begins(*_: object) -> RunFolder:
        begin(folder, ranks=2, most_restarts=3)
        return folder

    monkeypatch.setattr(torchrun, "prepare", first_begins)
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torchrun.attempts, "ending", partial(ending, patience_s=0.0))
    has_rank(monkeypatch, "raise SystemExit(1)")
    with folder.locked():
        folder.stop.touch()  # by someone, for the first one
        assert main(["pretrain", str(config)]) == BAD_INPUT
        assert folder.stop.exists()
    assert main(["pretrain", str(config)]) == FAILED, "nobody has it, so the ranks broke down"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_is_gone_is_told(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    """It is not that the ranks ended before the run began."""
    config = tmp_path / "config.yaml"
    config.write_text(f"run: {{dir: {tmp_path}, name: r}}")
    monkeypatch.setattr(torchrun, "prepare", lambda *_: folder)
    monkeypatch.setenv("NPROC_PER_NODE", str(ranks))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torchrun.attempts, "ending", partial(ending, patience_s=0.0))
    moves = f"import os; os.rename({str(folder.path)!r}, {str(tmp_path / 'moved')!r}); "
    has_rank(monkeypatch, moves + (DIE if ranks == 1 else "raise SystemExit(1)"))
    assert main(["pretrain", str(config)]) == BAD_INPUT
    assert "r: the folder is gone: moved, removed" in capsys.readouterr().err
    assert not folder.path.exists()


WAITS_FOR_TERM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
os.rename({run!r}, {moved!r})
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(30)
"""


def test_a_stop_request_that_cannot_be_written_reaches_the_ranks(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(folder)
    has_rank(monkeypatch, WAITS_FOR_TERM.format(run=str(folder.path), moved=str(tmp_path / "moved")))
    before = {number: signal.getsignal(number) for number in torchrun.STOP_SIGNALS}
    try:
        assert supervise(words, Layout(), folder) == 5
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "r/stop: cannot be made (No such file or directory); the ranks get TERM" in capsys.readouterr().err
