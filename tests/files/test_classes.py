"""classes.json beside shards, or a folder above."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitscale.errors import DataError
from vitscale.files.classes import class_names


def lay(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(content, encoding="utf-8")
    return folder


def test_beside_or_above(tmp_path: Path) -> None:
    lay(tmp_path / "a", json.dumps(["ant", "bee"]))
    lay(tmp_path / "b", json.dumps(["ant", "bee"]))
    shards = [tmp_path / "a" / "train" / "0.tar", tmp_path / "b" / "0.tar"]
    assert class_names(shards) == ["ant", "bee"]
    assert class_names([]) is None
    assert class_names([tmp_path / "none" / "0.tar"]) is None


def test_shards_that_differ(tmp_path: Path) -> None:
    lay(tmp_path / "a", json.dumps(["ant", "bee"]))
    lay(tmp_path / "b", json.dumps(["bee", "ant"]))
    assert class_names([tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar"]) is None
    assert class_names([tmp_path / "a" / "0.tar", tmp_path / "c" / "0.tar"]) is None
    differing = [tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar"]
    with pytest.raises(DataError, match="a label would mean two classes; pack both anew"):
        class_names(differing, one_meaning=True)


@pytest.mark.parametrize("content", ["[1, 2]", '{"a": 1}', "[", pytest.param("[" * 99999, id="brackets"), "\udcff"])
def test_no_list_of_names(tmp_path: Path, content: str) -> None:
    lay(tmp_path, "").joinpath("classes.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"classes\.json: .*; mend it or take it away"):
        class_names([tmp_path / "0.tar"])
