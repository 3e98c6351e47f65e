"""How a finished export takes its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from vitscale.errors import ConfigError
from vitscale.export.model import _kept


def test_the_graph_comes_last_so_that_it_never_lacks_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the weights beside it cannot be put in their place, the old file stays."""
    out, replace = tmp_path / "model.onnx", os.replace
    out.write_text("old")

    def fail_for_weights(source: Path, target: Path, **options: Any) -> None:
        if target.suffix == ".data":
            raise OSError("no space left")
        replace(source, target, **options)

    monkeypatch.setattr(os, "replace", fail_for_weights)

    def export() -> None:
        with _kept(out) as target:
            target.write_text("new")
            target.with_name("model.onnx.data").write_text("weights")

    with pytest.raises(ConfigError, match=r"--out .*model.onnx: cannot be written: no space left; name another place"):
        export()
    assert out.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_beside_a_larger_model_before_are_taken_away(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    for name in ("model.onnx", "model.onnx.data", "model.onnx.txt"):
        (tmp_path / name).write_text("old")
    with _kept(out) as target:
        target.write_text("new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.txt"]
    assert out.read_text() == "new"
