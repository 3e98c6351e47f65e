"""The launcher's index is taken once, and for the keys that it was made of alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.makers import write_shards
from vitscale.config.schema import Data, Source
from vitscale.data.handover import hand_over, taken_over
from vitscale.data.index import open_index
from vitscale.files.stores import Stores


def test_it_is_taken_once_for_the_same_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [2, 3])
    data, store = Data(train=(Source(f"{tmp_path}/*.tar"),)), Stores()
    index = open_index(data.train, None, tmp_path, store=store)
    before = sorted(tmp_path.iterdir())
    for other in (replace(data, label="txt"), replace(data, train=(Source(f"{tmp_path}/s000.tar"),))):
        hand_over(index, data, tmp_path)
        assert taken_over(other, tmp_path, store) is None
    hand_over(index, data, tmp_path)
    monkeypatch.setattr(Stores, "stat", None)  # no shard is looked at
    taken = taken_over(data, tmp_path, store)
    assert taken is not None
    assert (taken.paths, taken.digest, taken.sources) == (index.paths, index.digest, index.sources)
    assert taken_over(data, tmp_path, store) is None
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_one_is_none(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    data = Data(train=(Source(f"{tmp_path}/*.tar"),))
    hand_over(open_index(data.train, None, tmp_path), data, tmp_path)
    path = tmp_path / ".index-of-launcher"
    path.write_bytes(path.read_bytes()[:-1])
    assert taken_over(data, tmp_path, Stores()) is None
