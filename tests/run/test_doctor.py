"""What `vitscale doctor` says of a run that has not started, and that it leaves nothing."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.makers import photo, write_shards, write_tar
from vitscale.checkpoint.fragments import Piece
from vitscale.checkpoint.saving import save_checkpoint
from vitscale.checkpoint.store import SoleRank
from vitscale.config.schema import (
    AUTO,
    Data,
    Evaluation,
    Model,
    Objective,
    Run,
    RunConfig,
    Source,
    Tracking,
    Train,
)
from vitscale.data.index import store_of, unused_cache
from vitscale.engine.links import Links
from vitscale.files.store import LocalFiles
from vitscale.launch import slurm
from vitscale.models.auto import model_keys
from vitscale.run import doctor
from vitscale.run.doctor import Finding
from vitscale.run.start import order_keys
from vitscale.run.training_data import training_index
from vitscale.run_folder import BAD_INPUT, DONE, RunFolder
from vitscale.world import World

SHARDS = "shards"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / SHARDS).mkdir()
    write_shards(tmp_path / SHARDS, [6, 6])
    return RunConfig(
        run=Run(dir=str(tmp_path / "runs")),
        model=Model(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
                    patch_size=4),
        data=Data(train=(Source(f"{tmp_path / SHARDS}/*.tar"),), patience_s=1.0),
        train=Train(global_batch=8, micro_batch=8, steps=1),
    )  # fmt: skip


@pytest.fixture
def server() -> Iterator[str]:
    """The address of what answers /health as MLflow's server does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not to the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def report(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """The code, and the first line of each thing."""
    code = doctor.doctor(config, World())
    lines: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        level, what, text = re.split(r"\s{2,}", line, maxsplit=2)
        lines.setdefault(what, f"{level}: {text}")
    return code, lines


def test_a_run_that_can_start(
    config: RunConfig, tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, lines = report(replace(config, tracking=Tracking(mlflow_uri=server)), capsys)
    assert code == DONE, lines
    assert lines["data"].startswith("warning: 2 shards of 0.0 GB, 2 of them not in their index.json")
    assert lines["run folder"] == f"ok: {tmp_path} can be written"
    assert lines["MLflow"] == f"ok: {server} answers"
    assert lines["config"].endswith("8 images a step on each")
    assert "torch" in lines["ranks"]
    assert sorted(tmp_path.rglob("*")) == before


def test_all_that_is_wrong_is_told_at_once(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").touch()  # no folder can be made below it
    broken = replace(
        config,
        run=replace(config.run, dir="/proc/runs"),
        data=replace(config.data, train=(*config.data.train, Source(str(tmp_path / "none.tar")))),
        train=replace(config.train, micro_batch=3),
        tracking=Tracking(mlflow_uri="http://127.0.0.1:9"),
    )
    code, lines = report(broken, capsys)
    assert code == BAD_INPUT
    assert lines["config"].startswith("FAILED: train.global_batch=8: must be a multiple of")
    assert lines["data"].startswith(f"FAILED: {tmp_path}/none.tar: no such file")
    assert lines["run folder"].startswith("FAILED: cannot write to /proc")
    assert lines["MLflow"].startswith("warning: http://127.0.0.1:9 does not answer")


def test_an_address_that_is_none_of_mlflow(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for uri, level in (("httpx://a", "warning"), ("sqlite:////data/a.db", "ok"), ("databricks", "ok")):
        lines = report(replace(config, tracking=Tracking(mlflow_uri=uri)), capsys)[1]
        assert lines["MLflow"].startswith(f"{level}: {uri}")


def test_a_shard_that_is_no_tar(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / SHARDS / "a.tar").write_bytes(b"<html>" * 1000)
    code = doctor.doctor(config, World())
    assert code == BAD_INPUT
    assert f"{tmp_path}/{SHARDS}/a.tar: is no tar file that can be read" in capsys.readouterr().out


def labelled(config: RunConfig, labels: int, **model: int) -> RunConfig:
    """Shards with the labels 0 to `labels` - 1, to be classified."""
    folder = Path(config.data.train[0].pattern).parent
    samples = [
        (f"{i}.{kind}", data) for i in range(12) for kind, data in (("jpg", photo(i)), ("cls", b"%d" % (i % labels)))
    ]
    write_tar(folder / "a.tar", samples)
    return replace(
        config,
        data=replace(config.data, train=(Source(f"{folder}/a.tar"),)),
        objective=Objective(name="classification"),
        model=replace(config.model, **model),
    )


def resumed(config: RunConfig, folder: Path) -> RunConfig:
    """The config of a run that has a checkpoint."""
    index = training_index(config, RunFolder(folder / "cache"), store_of(config.data))
    setting = SimpleNamespace(config=config, index=index, folder=None, skipped=())
    state = {"step": 1, "samples": 8, "adam_step": 1, "total_steps": 1, "decoder": "pillow",
             "model": model_keys(config), "order": order_keys(setting)}  # fmt: skip
    checkpoints = RunFolder.at(config.run.dir, config.run.name).checkpoints
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoints, 1, [Piece("param", "w", (1,), 0, np.ones(1, np.float32))], state, SoleRank(), 1)
    return config


@pytest.mark.parametrize(("change", "says"), [
    (lambda c, _: replace(c, train=replace(c.train, global_batch=4096, micro_batch=8)), "train.global_batch=4096"),
    (lambda c, _: replace(c, model=replace(c.model, init_from="/nonexistent")), "/nonexistent"),
    (lambda c, _: replace(c, evaluation=Evaluation(every_steps=1, test=(Source("/none.tar"),))), "/none.tar: no such"),
    (lambda c, _: replace(c, objective=Objective(name="classification"), data=replace(c.data, label="class")),
     "no member has the extension data.label='class'"),
    (lambda c, _: labelled(c, 12, num_labels=4), "with model.num_labels=4"),
    (lambda c, p: replace(resumed(c, p), run=replace(c.run, seed=7)), "was saved with run.seed=0, this run has 7"),
    (lambda c, p: replace(resumed(c, p), model=replace(c.model, hidden_size=64)), "another model: model.hidden_size"),
    (lambda c, _: replace(c, optimizer=replace(c.optimizer, layer_decay=0.5)), "optimizer.layer_decay=0.5: is for"),
])  # fmt: skip
def test_what_a_start_would_refuse(
    config: RunConfig, tmp_path: Path, change: Callable[[RunConfig, Path], RunConfig], says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    refused = change(config, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = doctor.doctor(refused, World())
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert code == BAD_INPUT
    assert len(failed) == 1
    assert says in failed[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_from_where_a_start_goes_on(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(config, capsys)[1]["start"] == "ok: starts from scratch, 1 steps an epoch"
    assert report(labelled(config, 4, num_labels=4), capsys)[1]["start"].startswith("ok: starts from scratch")
    code, lines = report(resumed(config, tmp_path), capsys)
    assert code == DONE
    assert lines["start"].startswith("ok: goes on from ")
    assert lines["start"].endswith("step_00000001")


def test_a_pipe_is_no_shard(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe.tar"
    os.mkfifo(pipe)
    code, lines = report(replace(config, data=replace(config.data, train=(Source(str(pipe)),))), capsys)
    assert code == BAD_INPUT
    assert lines["data"].startswith(f"FAILED: {pipe}: cannot be read: is a pipe")
    with pytest.raises(OSError, match="Illegal seek"):
        LocalFiles().read(str(pipe), 0, 1)


def test_a_cache_that_is_not_used_is_told(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with_cache = replace(config, data=replace(config.data, cache="/local/cache"))
    assert doctor.doctor(with_cache, World()) == DONE
    line = "data.cache=/local/cache: is for shards at URLs, and not used for the shards of data.train"
    assert line in capsys.readouterr().out
    for some, lines in ((config, 0), (with_cache, 1)):  # at a start
        training_index(some, RunFolder.at(some.run.dir, "run"), store_of(some.data))
        assert capsys.readouterr().err.count(line) == lines
    some = unused_cache(with_cache.data, ["a.tar", "s3://b/c.tar"])
    assert some is not None
    assert "not used for 1 of the 2 shards" in some
    assert unused_cache(with_cache.data, ["s3://b/c.tar"]) is None


def test_what_auto_would_be_is_told(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = report(replace(config, train=replace(config.train, micro_batch=AUTO)), capsys)
    assert code == DONE, lines
    assert re.match(r"ok: would be train\.micro_batch=8: \d+ MB of [\d.]+ [GM]B .*, by the plan$", lines["auto"])
    assert lines["config"].endswith("8 images a step on each")
    assert "auto" not in report(config, capsys)[1]


def test_ranks_that_differ_have_lines_of_their_own() -> None:
    few, many = (Finding("ok", "open files", text) for text in ("at most 1,024", "at most 4,096"))
    alike = Finding("ok", "data", "can be read")
    found = doctor._together([("a", [alike, many]), ("a", [alike, many]), ("b", [alike, few])])
    assert [finding.text for finding in found] == [
        "all ranks: can be read",
        "ranks 0 on a, 1 on a: at most 4,096",
        "rank 2 on b: at most 1,024",
    ]


def test_the_slowest_link_is_named() -> None:
    links = Links(0.001, 0.3, (("a", "b", 0.1), ("b", "c", 0.5), ("c", "d", 0.12)))
    _, slowest = doctor._of_links(links, World(world_size=4))
    assert slowest.level == "warning"
    assert slowest.text.startswith("slowest link: b to c, 64 MB in 500 ms (median 120 ms)")


@pytest.mark.parametrize(("shown", "script", "warned"), [
    ("Requeue=1", "#!/bin/bash\n#SBATCH --signal=B:USR1@120\n", []),
    ("Requeue=0", "#!/bin/bash\n#SBATCH --signal=B:USR1@120\n", ["--requeue"]),
    ("Requeue=0", "#!/bin/bash\n", ["--requeue", "--signal=B:USR1@120"]),
    ("Requeue=1", "#SBATCH --requeue --signal B:SIGTERM@300\n", []),
    ("Requeue=1", "#SBATCH --signal=USR1@120\n", ["without B:"]),
    ("Requeue=1", "#SBATCH --signal=B:USR1@10\n", ["leaves 10 s to save, less than checkpoint.notice_s=120"]),
    ("Requeue=1", "#SBATCH --signal=B:USR1\n", ["leaves 60 s"]),
    ("Requeue=1", "#SBATCH --signal=B:HUP@120\n", ["does not take for a wish to stop"]),
    ("Requeue=1", "#SBATCH --signal=@@\n", ["none that Slurm knows"]),
])  # fmt: skip
def test_settings_of_a_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: str, script: str, warned: list[str]
) -> None:
    """By a program in the place of scontrol."""
    (tmp_path / "script").write_text(script)
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\nif [ $1 = show ]; then echo {shown}; else cat {tmp_path}/script; fi\n")
    program.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = slurm.job_warnings(120.0)
    assert found is not None
    assert len(found) == len(warned)
    assert all(way in text for way, text in zip(warned, found, strict=True))
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm.job_warnings(120.0) is None
