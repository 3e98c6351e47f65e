"""`vitscale index`: in processes, in parts, stopped and started again, and an index held against its shards."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.data.makers import write_shards, write_tar
from tests.data.stores import CountingFiles
from tests.files.test_stores import s3
from tests.files.web import served, stall_after
from vitscale.cli import main
from vitscale.config.schema import Source
from vitscale.data.index import ShardIndex, build_index, open_index
from vitscale.data.indexing import make_index
from vitscale.data.sidecar import FOLDER
from vitscale.files.store import LocalFiles, OnePass, sha256_of
from vitscale.run_folder import BAD_INPUT, DONE
from vitscale.text import listed

__all__ = ["s3"]  # the fixture
pytestmark = pytest.mark.usefixtures("environment")
COUNTS = [3, 5, 2, 4, 1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards that nobody has looked at."""
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", COUNTS)
    forget(tmp_path / "shards")
    return tmp_path / "shards"


def forget(folder: Path) -> None:
    for path in (folder / FOLDER).iterdir():
        path.unlink()


def index(*words: object) -> int:
    return main(["index", *map(str, words)])


@pytest.fixture
def whole(folder: Path) -> bytes:
    """What the index of all shards is to be."""
    assert index(f"{folder}/*.tar", "--out", folder.parent / "whole.json") == DONE
    forget(folder)
    return (folder.parent / "whole.json").read_bytes()


# ---- parts


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_are_joined_by_the_last_to_end(
    folder: Path, whole: bytes, order: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "index.json"
    said = []
    for number in order:
        assert not out.exists()
        assert index(f"{folder}/*.tar", "--out", out, "--part", f"{number}/3") == DONE
        said.append(capsys.readouterr().out)
    assert said[0].endswith(
        f"parts that are missing, or of shards that changed since: {listed(sorted(order[1:]))} of 3\n"
    )
    assert said[1].endswith(f"since: {order[2]} of 3\n")
    assert said[2] == f"{out}: 15 samples in 5 shards\n"
    assert out.read_bytes() == whole
    assert not any(path.name.startswith(("index.json.", ".index")) for path in folder.parent.iterdir())


def test_parts_that_end_at_once(folder: Path, whole: bytes) -> None:
    """One of them joins all; more parts than shards leave some empty."""
    out = folder.parent / "index.json"
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(make_index, [f"{folder}/*.tar"], out, label="cls", part=(i, 8)) for i in range(1, 9)]
        said = [call.result() for call in calls]
    assert f"{out}: 15 samples in 5 shards" in said
    assert out.read_bytes() == whole
    assert not Path(f"{out}.parts").exists()


def test_a_part_of_an_earlier_state_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As is one that is cut; a call without parts needs none of them."""
    out, parts = folder.parent / "index.json", folder.parent / "index.json.parts"
    words = (f"{folder}/*.tar", "--out", out)
    index(*words, "--part", "1/3")
    index(*words, "--part", "2/3")
    os.utime(write_tar(folder / "s003.tar", [("a.jpg", b"x"), ("b.jpg", b"x")]), ns=(1, 1))
    (parts / "2-of-3.json").write_bytes((parts / "2-of-3.json").read_bytes()[:-9])
    capsys.readouterr()
    assert index(*words, "--part", "3/3") == DONE
    assert "since: 1, 2 of 3\n" in capsys.readouterr().out
    assert not out.exists()
    index(*words)
    assert ShardIndex.load(out).samples.tolist() == [3, 5, 2, 2, 1]
    assert not parts.exists()


@pytest.mark.parametrize("words", [("--part", "0/3"), ("--part", "4/3"), ("--part", "x"), ("--check", "i.json"), ()])
def test_words_that_do_not_go_together(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        index("a.tar", *words)
    assert ended.value.code == BAD_INPUT
    assert "vitscale index: error: " in capsys.readouterr().err


# ---- processes, and what is left of one that was killed


def children(of: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{of}/task").glob("*/children") for word in path.read_text().split()]


def test_killed_and_started_again_it_reads_what_is_missing(folder: Path, whole: bytes) -> None:
    """From a server, in two processes; none of them outlives the kill."""
    out = folder.parent / "index.json"
    with served() as web:
        for i in range(len(COUNTS)):
            web.files[f"/d/s{i:03d}.tar"] = (folder / f"s{i:03d}.tar").read_bytes()
        web.faults["/d/s003.tar"] = [lambda *_: False, stall_after(10, 60)]
        words = ["index", f"{web.url}/d/s{{000..004}}.tar", "--out", str(out), "--workers", "2"]
        command = subprocess.Popen([sys.executable, "-m", "vitscale.cli", *words])
        tables = wait_for_tables(folder.parent, len(COUNTS) - 1)
        workers = children(command.pid)
        assert len(workers) >= 2
        command.send_signal(signal.SIGKILL)
        command.wait()
        deadline = time.monotonic() + 30
        while any(map(is_alive, workers)):
            assert time.monotonic() < deadline, "processes were left"
            time.sleep(0.02)
        assert not out.exists()
        assert "s003" not in " ".join(tables)
        web.requests.clear()
        assert index(*words[1:]) == DONE
        read = {name for name, span in web.requests if name.endswith(".tar") and span != "bytes=0-0"}
        assert read == {"/d/s003.tar"}, "the others have their tables"
    again = ShardIndex.load(out)
    before = ShardIndex.load(folder.parent / "whole.json")
    assert (again.digest, again.sha256) == (before.digest, before.sha256)


def wait_for_tables(folder: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 30
    while len(found := [path.name for path in folder.glob("index-*.tables/s*.table")]) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def is_alive(process: int) -> bool:
    """And no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_was_uploaded_beside_the_shards_is_taken(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Index and tables that lay beside the local shards, whose files had other times: no shard is read."""
    build_index([str(path) for path in sorted(folder.glob("*.tar"))]).save(folder / "index.json")
    with served() as web:
        for path in folder.rglob("*"):
            if path.is_file():
                web.files[f"/d/{path.relative_to(folder)}"] = path.read_bytes()
        pattern = f"{web.url}/d/s{{000..004}}.tar"
        for number, sources in enumerate([(Source(pattern),), (Source(pattern),)]):
            index = open_index(sources, f"{web.url}/d/index.json" if number else None, tmp_path / str(number))
            assert len(index.table(0, "cls")) == index.samples[0]
        spans = {span for name, span in web.requests if name.endswith(".tar")}
    assert spans == {"bytes=0-0"}
    assert capfd.readouterr().err == ""


def test_a_bucket_in_processes(folder: Path, whole: bytes, s3: str) -> None:
    """obstore's threads, which listing has started, do not survive a fork."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    client.create_bucket(Bucket="indexed")
    for path in folder.glob("*.tar"):
        client.upload_file(str(path), "indexed", f"d/{path.name}")
    out = folder.parent / "index.json"
    assert index("s3://indexed/d/*.tar", "--out", out, "--workers", "2") == DONE
    assert ShardIndex.load(out).sha256 == ShardIndex.load(folder.parent / "whole.json").sha256
    assert index("--check", out) == DONE


def test_a_shard_is_read_once(folder: Path) -> None:
    """For its headers and its sha256."""
    path = str(write_tar(folder / "large.tar", [(f"{i}.jpg", bytes(700_000 * i)) for i in range(5)]))
    store, size = CountingFiles(), os.path.getsize(path)
    built = build_index([path], store=store)
    assert (built.total, built.sha256) == (5, (sha256_of(path),))
    spans = sorted((start, min(start + count, size)) for read, start, count in store.reads if read == path)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][0] == size, "to its end"
    data, passing = Path(path).read_bytes(), OnePass(LocalFiles(), path)
    for start, count in ((0, 1024), (512, 1024), (512, 700_000), (2_000_000, 3_000_000), (size - 100, 1000)):
        assert passing.read(path, start, count) == data[start : start + count]


# ---- an index held against its shards


@pytest.fixture
def kept(folder: Path) -> Path:
    assert index(f"{folder}/*.tar", "--out", folder / "index.json") == DONE
    return folder / "index.json"


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_what_is_as_it_was_is_no_difference(folder: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor are later times, as of a copy, nor tables that are not there or of an earlier state."""
    capsys.readouterr()
    before = state(folder)
    assert index("--check", kept, "--workers", "2") == DONE
    assert capsys.readouterr().out == f"{kept}: 0 of 5 shards differ\n"
    assert state(folder) == before
    os.utime(folder / "s000.tar", ns=(1, 1))
    (folder / FOLDER / "s001.tar.cls.table").unlink()
    assert index("--check", kept, "--label", "jpg") == index("--check", kept) == DONE
    assert len(os.listdir(folder / FOLDER)) == 4


def test_each_shard_that_differs_is_named_with_a_reason(
    folder: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(folder.parent, [2])
    data = {name: (folder / name).read_bytes() for name in ("s001.tar", "s002.tar", "s003.tar")}
    (folder / "s000.tar").unlink()
    (folder / "s001.tar").write_bytes(data["s001.tar"][:-512])
    at = data["s002.tar"].index(b"\xff\xd8") + 100
    (folder / "s002.tar").write_bytes(data["s002.tar"][:at] + b"?" + data["s002.tar"][at + 1 :])  # an image's byte
    (folder / "s003.tar").write_bytes(b"?" + data["s003.tar"][1:])
    table, other = (folder / FOLDER / f"s004.tar.{label}.table" for label in ("cls", "x"))
    table.write_bytes(table.read_bytes()[:-1])
    capsys.readouterr()
    before = state(folder)
    assert index("--check", kept) == BAD_INPUT
    *lines, last = capsys.readouterr().out.splitlines()
    reasons = ("cannot be read: No such file", "bytes, the index says", "has sha256", "is no tar", "its table")
    for i, reason in enumerate(reasons):
        assert lines[i].startswith(f"{folder}/s00{i}.tar: ")
        assert reason in lines[i]
    assert last == f"{kept}: 5 of 5 shards differ"
    assert state(folder) == before
    assert not other.exists()


def test_counts_and_tables_that_lie(folder: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept.write_text(kept.read_text().replace('"samples": 5', '"samples": 6'))
    tables = folder / FOLDER
    os.utime(folder / "s004.tar", ns=(os.stat(folder / "s000.tar").st_mtime_ns,) * 2)
    lying = write_tar(folder.parent / "s000.tar", [(f"{i:06d}.jpg", bytes(300)) for i in range(1, 4)])
    lying.write_bytes(lying.read_bytes().ljust(os.path.getsize(folder / "s000.tar"), b"\0"))
    os.utime(lying, ns=(os.stat(folder / "s000.tar").st_mtime_ns,) * 2)
    index(lying, "--out", folder.parent / "other.json")
    (tables / "s000.tar.cls.table").write_bytes((lying.parent / FOLDER / "s000.tar.cls.table").read_bytes())
    capsys.readouterr()
    assert index("--check", kept) == BAD_INPUT
    first, second, last = capsys.readouterr().out.splitlines()
    assert "s000.tar.cls.table says other things than its headers; delete that file" in first
    assert "s001.tar: holds 5 samples, the index says 6" in second
    assert "2 of 5" in last
    assert index("--check", folder / "s000.tar") == BAD_INPUT
    assert "is no index" in capsys.readouterr().err


# ---- slurm/index.sh


def test_the_script_of_an_array(folder: Path, whole: bytes) -> None:
    """As Slurm runs it, with the numbers that it gives to tasks of --array=10-14:2."""
    root, out = Path(__file__).resolve().parents[2], folder.parent / "index.json"
    script, venv = root / "slurm" / "index.sh", {"VITSCALE_VENV": sys.prefix, "VITSCALE_HOME": str(root)}
    numbers = {f"SLURM_ARRAY_TASK_{name}": number
               for name, number in {"MIN": "10", "MAX": "14", "COUNT": "3", "STEP": "2"}.items()}  # fmt: skip

    def task(number: int, **more: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | venv | numbers | {"SLURM_ARRAY_TASK_ID": str(number)} | more
        return subprocess.run(["bash", script, f"{folder}/*.tar"], env=environment, capture_output=True, text=True)

    refused = task(10)
    assert (refused.returncode, refused.stdout) == (BAD_INPUT, "")
    assert "OUT=" in refused.stderr
    refused = task(10, OUT=str(out), SLURM_ARRAY_TASK_COUNT="2", SLURM_ARRAY_TASK_STEP="1")  # --array=10,14
    assert (refused.returncode, refused.stdout) == (BAD_INPUT, "")
    assert "--array has gaps" in refused.stderr
    assert "--array=1-2" in refused.stderr
    ended = [task(number, OUT=str(out)) for number in (14, 10, 12)]
    assert [each.returncode for each in ended] == [DONE] * 3, ended
    assert "parts that are missing, or of shards that changed since: 1, 2 of 3" in ended[0].stdout
    assert out.read_bytes() == whole
