"""Shards from HTTP and S3 servers on loopback: the run is the one that local shards give."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from tests.files import web as faults
from tests.files.test_stores import s3
from tests.files.web import Proxy, Web, running, served
from tests.integration.worlds import Launcher, World, losses, rows, trace
from vitscale.run_folder import DONE, STOPPED

__all__ = ["s3"]  # the fixture
STEPS = 12


@pytest.fixture
def web(shards: Path) -> Iterator[Web]:
    with served() as server:
        for path in [*shards.glob("*.tar"), shards / "index.json"]:
            server.files[f"/d/{path.name}"] = path.read_bytes()
        yield server


@pytest.fixture
def local(launcher: Launcher, config: Path, tmp_path: Path) -> dict[int, list[str]]:
    launcher.run(["pretrain", str(config), f"train.steps={STEPS}", "run.name=local"])
    return trace(tmp_path / "runs" / "local")


def pattern(web: Web, shards: Path) -> str:
    names = sorted(path.name for path in shards.glob("*.tar"))
    return f"{web.url}/d/{names[0][:-5]}{{0..{len(names) - 1}}}.tar"


def misbehave(web: Web) -> None:
    """Every file's requests fail in turn, from the third on."""
    kinds = [faults.status(503), faults.cut_after(5_000), faults.hang_up, faults.status(429, Retry_After="0")]
    for name in web.files:
        several = itertools.islice(itertools.cycle(kinds), 8)
        web.faults[name] = [lambda *_: False, lambda *_: False, *several]


@pytest.mark.parametrize(
    "ways",
    [["data.cache=CACHE"], pytest.param([], marks=pytest.mark.full), ["data.index=URL/d/index.json"]],
    ids=["cache", "ranges", "index"],
)
def test_http_gives_the_local_trace(
    launcher: Launcher,
    config: Path,
    tmp_path: Path,
    web: Web,
    shards: Path,
    local: dict[int, list[str]],
    ways: list[str],
) -> None:
    misbehave(web)
    ways = [way.replace("CACHE", str(tmp_path / "cache")).replace("URL", web.url) for way in ways]
    argv = ["pretrain", str(config), f"data.train={pattern(web, shards)}", *ways]
    argv += [f"train.steps={STEPS}", f"checkpoint.every_steps={STEPS // 2}"]
    launcher.run(argv, ranks=2)
    run = tmp_path / "runs" / "run"
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    launcher.run(argv)  # goes on from the middle, on another number of ranks
    assert trace(run) == local
    assert losses(run) == pytest.approx(losses(tmp_path / "runs" / "local"), rel=1e-5)
    assert rows(run)[-1]["data_retries"] > 0


def test_s3_with_every_fault_at_once_gives_the_local_trace(
    launcher: Launcher,
    config: Path,
    tmp_path: Path,
    s3: str,
    shards: Path,
    local: dict[int, list[str]],
) -> None:
    """Transfers are cut and refused, a reader is killed, the ranks are 2, then 1, then 4."""
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    for path in shards.glob("*.tar"):
        client.upload_file(str(path), "images", f"set/{path.name}")
    argv = ["pretrain", str(config), "data.train=s3://images/set/*.tar", "checkpoint.every_steps=4"]
    with running(Proxy(s3)) as proxy:
        found = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

        def start(ranks: int, steps: int, *keys: str) -> World:
            words = [*argv, f"train.steps={steps}", *keys]
            return launcher.request(ranks, argv=words, environment=found | {"AWS_ENDPOINT_URL": proxy.url})

        world = start(2, STEPS // 3, f"data.cache={tmp_path}/cache")
        assert world.wait() == [DONE] * 2, world.output()
        interrupted = start(1, 2 * STEPS // 3)
        killed = kill_reader(interrupted)
        assert interrupted.wait() == [DONE], interrupted.output()
        world = start(4, STEPS)
        assert world.wait() == [DONE] * 4, world.output()
        assert proxy.faults > 4
    assert trace(tmp_path / "runs" / "run") == local
    assert "the reader process died (signal 9) and is started again" in interrupted.output(), killed


def kill_reader(world: World) -> int:
    """Once it is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it ended
                words, stat = path.read_bytes().split(b"\0"), (path.parent / "stat").read_text()
                if b"vitscale.data.reader" in words and int(stat.rpartition(")")[2].split()[1]) == world.pids[0]:
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    return int(path.parent.name)
        time.sleep(0.005)
    raise AssertionError("no reader came")


def test_storage_that_stays_away_requeues(
    launcher: Launcher, config: Path, tmp_path: Path, web: Web, shards: Path
) -> None:
    argv = ["pretrain", str(config), f"data.train={pattern(web, shards)}", "data.patience_s=5", "train.steps=100000"]
    world = launcher.start([*argv, f"data.index={web.url}/d/index.json"], ranks=2)
    run, deadline = tmp_path / "runs" / "run", time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(rows(run)) > 2):
        assert time.monotonic() < deadline, world.output()
        time.sleep(0.1)
    for name in web.files:
        web.faults[name] = [faults.status(503, Retry_After="1")] * 100_000  # told when, patience alone counts
    assert world.wait() == [STOPPED] * 2, world.output()
    assert "its storage failed" in world.output()
