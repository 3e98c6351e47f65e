"""What the ranks of a run must agree on, and where a run can resume from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.data.makers import write_shards
from vitscale.config.check import lanes
from vitscale.config.load import dump_config
from vitscale.config.schema import Data, Evaluation, RunConfig, Source, Train
from vitscale.data.index import ShardIndex, build_index
from vitscale.data.order import Order
from vitscale.engine.loop import TrainState
from vitscale.errors import CheckpointError, DataError, LaunchError
from vitscale.run import session, start
from vitscale.run.preflight import RankReport
from vitscale.run.session import Session
from vitscale.run_folder import RunFolder
from vitscale.world import World

CONFIG = RunConfig(train=Train(global_batch=8, micro_batch=8, steps=10), data=Data(lanes=2, window=16))


def index(samples: int = 25) -> ShardIndex:
    counts = np.array([samples, 20])
    return ShardIndex(("/d/a.tar", "/d/b.tar"), ("a", "b"), counts, counts * 1000, (None, None), counts)


def make_session(folder: Path, config: RunConfig = CONFIG, samples: int = 25, decoder: str = "pillow") -> Session:
    """Of one rank, without a process group."""
    shards = index(samples)
    order = Order(shards.samples, config.run.seed, config.train.global_batch, lanes(config), config.data.window)
    nothing: Any = None
    return Session(config, World(), RunFolder(folder), nothing, nothing, shards, order, decoder)


class TwoRanks:
    """What rank 0 gathers where rank 1, on another host, has another value under `differs`."""

    rank = 0

    def __init__(self, differs: str | None) -> None:
        self.differs = differs

    def gather(self, own: RankReport) -> list[RankReport]:
        if self.differs is None:
            return [own, own]
        assert self.differs in own.common
        return [own, replace(own, host="node2", common={**own.common, self.differs: "another"})]


COMMON = ("run folder", "config", "index", "decoder", "version of vitscale", "code of vitscale", "version of torch",
          "version of deepspeed", "version of Python", "NVIDIA driver")  # fmt: skip


@pytest.mark.parametrize("differs", COMMON)
def test_ranks_of_different_runs_are_an_error(tmp_path: Path, differs: str) -> None:
    write_shards(tmp_path, [2, 2])
    of_shards = build_index([str(tmp_path / "s000.tar"), str(tmp_path / "s001.tar")])

    def require(ranks: Any) -> None:
        session._require_ready(CONFIG, World(), ranks, RunFolder(tmp_path / "run"), of_shards, "pillow")

    require(TwoRanks(None))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(LaunchError, match=rf"rank 1 on node2 has another {differs} \(another\) than rank 0 on "):
        require(TwoRanks(differs))


def test_configs_differ_in_their_digest() -> None:
    digest = session.config_digest(CONFIG)
    assert len(digest) == 16
    assert digest == session.config_digest(replace(CONFIG))
    assert digest != session.config_digest(replace(CONFIG, optimizer=replace(CONFIG.optimizer, lr=0.5)))


@pytest.mark.parametrize(("epochs", "steps"), [(3, 15), (0.5, 2), (0.01, 1)])
def test_epochs_are_whole_steps_and_at_least_one(tmp_path: Path, epochs: float, steps: int) -> None:
    of_epochs = replace(CONFIG, train=replace(CONFIG.train, steps=None, epochs=epochs))
    assert make_session(tmp_path, of_epochs).order.batches_per_epoch == 5
    assert make_session(tmp_path, of_epochs).total_steps == steps
    assert make_session(tmp_path).total_steps == 10


@pytest.mark.parametrize(("key", "changed", "samples"), [
    ("run.seed", replace(CONFIG, run=replace(CONFIG.run, seed=1)), 25),
    ("train.global_batch", replace(CONFIG, train=replace(CONFIG.train, global_batch=16)), 25),
    ("data.lanes", replace(CONFIG, data=replace(CONFIG.data, lanes=4)), 25),
    ("data.window", replace(CONFIG, data=replace(CONFIG.data, window=32)), 25),
    ("the index", CONFIG, 26),
])  # fmt: skip
def test_a_checkpoint_of_another_order_is_refused(tmp_path: Path, key: str, changed: RunConfig, samples: int) -> None:
    saved: Any = SimpleNamespace(folder=tmp_path, state={"order": start.order_keys(make_session(tmp_path))})
    start._require_same_order(make_session(tmp_path), saved)
    said = "other shards" if key == "the index" else f"{key}="
    with pytest.raises(CheckpointError, match=f"was saved with {said}"):
        start._require_same_order(make_session(tmp_path, changed, samples), saved)


def test_shards_that_differ_are_named(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    saved: Any = SimpleNamespace(folder=tmp_path, state={"order": start.order_keys(session)})
    start.keep_shards(session)
    start._require_same_order(session, saved)
    shards = session.index
    names = ["grown.tar", *shards.names[1:]]
    changed = replace(session, index=replace(shards, names=names, samples=shards.samples + 1, bytes=shards.bytes))
    with pytest.raises(CheckpointError) as caught:
        start._require_same_order(changed, saved)
    text = str(caught.value)
    assert f"1 new: grown.tar; 1 gone: {shards.names[0]}" in text
    assert "data.when_changed=new_epoch, or train on these by another run.name with model.init_from" in text
    taken = replace(changed, config=replace(CONFIG, data=replace(CONFIG.data, when_changed="new_epoch")))
    assert start._require_same_order(taken, saved) == "1 new: grown.tar; 1 gone: a; 1 changed: b"
    seed = replace(taken, config=replace(taken.config, run=replace(CONFIG.run, seed=1)))
    with pytest.raises(CheckpointError, match=r"was saved with run\.seed="):
        start._require_same_order(seed, saved)
    before = session.folder.shards.stat().st_mtime_ns
    start.keep_shards(session)
    assert session.folder.shards.stat().st_mtime_ns == before  # the same ones are not written again


@pytest.mark.parametrize("samples", [25, 60, 5])  # 5, 9 and 2 steps an epoch
@pytest.mark.parametrize("stopped", [1, 4, 5, 6, 10, 13])
def test_other_shards_begin_an_epoch_that_was_never_begun(
    tmp_path: Path, samples: int, stopped: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their first step is the first of that epoch; twice in a row as well."""
    session, batch = make_session(tmp_path), CONFIG.train.global_batch
    state = TrainState(step=stopped, samples=stopped * batch, epoch=(stopped - 1) // session.order.batches_per_epoch)
    for other in (make_session(tmp_path, samples=samples), make_session(tmp_path, samples=samples + 8)):
        begun = state.epoch
        start._begin_epoch(other, state, "1 new: c")
        position = state.samples + state.shift
        refs = other.order.refs(position // batch, 0, batch)
        assert position % batch == 0
        assert position // batch == (begun + 1) * other.order.batches_per_epoch
        assert set(refs.epochs.tolist()) == {begun + 1}
        line = capsys.readouterr().out
        assert line.startswith(f"shards: 1 new: c; from step {state.step + 1} on these are read, from the start of ")
        state.step, state.samples, state.epoch = state.step + 1, state.samples + batch, begun + 1


def test_other_steps_and_another_decoder_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved: Any = SimpleNamespace(state={"total_steps": 10, "decoder": "pillow"})
    start._say_changes(make_session(tmp_path), saved)
    assert capsys.readouterr().out == ""
    longer = replace(CONFIG, train=replace(CONFIG.train, steps=12))
    start._say_changes(make_session(tmp_path, longer, decoder="simplejpeg"), saved)
    steps, decoder = capsys.readouterr().out.splitlines()
    assert steps.startswith("steps: 10 before, 12 now")
    assert decoder.startswith("decoder: pillow before, simplejpeg now")


def test_changed_keys_are_reported_once_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start.say_changed_keys(make_session(tmp_path))  # the first start
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    start.say_changed_keys(make_session(tmp_path))
    assert capsys.readouterr().out == ""
    changed = replace(CONFIG, train=replace(CONFIG.train, steps=12), optimizer=replace(CONFIG.optimizer, lr=0.5))
    start.say_changed_keys(make_session(tmp_path, changed))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"config: optimizer.lr was {CONFIG.optimizer.lr}, is 0.5"]  # steps have a line of their own
    (tmp_path / "config.yaml").write_text("model: {no_such_key: 1}\n")
    start.say_changed_keys(make_session(tmp_path))
    assert "config: the one of the last start cannot be compared: " in capsys.readouterr().out


def test_shards_that_are_not_there_are_told_with_their_key(tmp_path: Path) -> None:
    write_shards(tmp_path, [4, 4])
    shards, folder = build_index([f"{tmp_path}/s000.tar"]), RunFolder(tmp_path / "run")
    none = (Source(f"{tmp_path}/none-*.tar"),)
    for key, changed in (
        ("data.validation", replace(CONFIG, data=replace(CONFIG.data, validation=none))),
        ("evaluation.test", replace(CONFIG, evaluation=Evaluation(test=none, every_steps=1))),
    ):
        with pytest.raises(DataError, match=rf"^{key}='.*/none-\*\.tar': no such file"):
            session.look_at_others(changed, folder, shards, None)


def test_a_shard_on_both_sides_is_told_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, [2, 2])
    monkeypatch.chdir(tmp_path)
    whole, last = build_index([str(tmp_path / "s000.tar"), str(tmp_path / "s001.tar")]), build_index(["./s001.tar"])
    session.tell_shared("data.validation", last, "data.train", whole)
    assert f"data.validation: {tmp_path}/s001.tar: in data.train too" in capsys.readouterr().err
    session.tell_shared("data.validation", last, "data.train", build_index(["s000.tar"]))
    assert capsys.readouterr().err == ""
