"""Shards from HTTP and S3 servers on loopback: the run is the one that local shards give."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files import web as faults
from tests.files.test_stores import s3
from tests.files.web import Web, served
from tests.integration.worlds import Launcher, losses, rows, trace
from vitscale.run_folder import STOPPED

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
    assert rows(run)[-1]["data_retries"] > 0 or not ways or "cache" in ways[0]  # else rank 0 has met all faults


def test_s3_gives_the_local_trace(
    launcher: Launcher, config: Path, tmp_path: Path, s3: str, shards: Path, local: dict[int, list[str]]
) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    for path in shards.glob("*.tar"):
        client.upload_file(str(path), "images", f"set/{path.name}")
    names = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    argv = ["pretrain", str(config), "data.train=s3://images/set/*.tar", f"train.steps={STEPS}"]
    own = Launcher(tmp_path)  # one that has the environment of now
    try:
        own.run([*argv, f"data.cache={tmp_path}/cache"], ranks=2)
    finally:
        own.close()
    assert trace(tmp_path / "runs" / "run") == local
    assert names


def test_storage_that_stays_away_requeues(
    launcher: Launcher, config: Path, tmp_path: Path, web: Web, shards: Path
) -> None:
    argv = ["pretrain", str(config), f"data.train={pattern(web, shards)}", "data.patience_s=1", "train.steps=300"]
    world = launcher.start([*argv, f"data.index={web.url}/d/index.json"], ranks=2)
    run, deadline = tmp_path / "runs" / "run", time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(rows(run)) > 2):
        assert time.monotonic() < deadline, world.output()
        time.sleep(0.1)
    for name in web.files:
        web.faults[name] = [faults.status(503)] * 100_000
    assert world.wait() == [STOPPED] * 2, world.output()
    assert "its storage failed" in world.output()
