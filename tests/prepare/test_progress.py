"""How `vitscale pack` and `stats` look at many files, and what they say meanwhile."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.data.makers import photo
from vitscale.cli import main
from vitscale.prepare import progress
from vitscale.prepare.pack import find
from vitscale.prepare.progress import looked_at


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four classes of 20 images, and a list of them."""
    for number in range(80):
        path = tmp_path / "images" / f"c{number % 4}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(0))
    lines = [f"images/c{number % 4}/{number:02d}.jpg,{number % 4}" for number in range(80)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines, ""]))
    return tmp_path / "images"


@pytest.mark.parametrize("source", ["images", "list.csv"])
def test_files_are_asked_for_side_by_side(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two by two: a stat of an image waits until another thread asks for one too."""
    alone = find(str(folder.parent / source))
    pair, stat, main_thread = threading.Barrier(2, timeout=20), os.stat, threading.current_thread()

    def paired(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(".jpg"):
            assert threading.current_thread() is not main_thread
            pair.wait()
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", paired)
    assert find(str(folder.parent / source)) == alone, "the same samples in the same order"
    assert len(alone.samples) == 80


def test_each_phase_tells_how_far_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SAID_EVERY_S", 0.0)
    assert main(["pack", str(folder), str(folder.parent / "out"), "--shard-samples", "20", "--workers", "2"]) == 0
    lines = capsys.readouterr().err.splitlines()
    for line in (
        "pack: looking: 80 images so far",
        "pack: sizes: 80 of 80 images, 0s left",
        "pack: 80 of 80 images, 0s left",
    ):
        assert line in lines
    assert main(["stats", f"{folder.parent}/out/*.tar"]) == 0
    assert "stats: 80 of 80 samples, 0s left" in capsys.readouterr().err.splitlines()


def test_results_are_in_their_order_and_the_first_error_ends_all() -> None:
    assert looked_at(lambda number: number**2, range(5000), "", "") == [number**2 for number in range(5000)]
    assert looked_at(lambda number: number, [], "", "") == []
    asked = []

    def fail(number: int) -> None:
        asked.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match=r"^0$"):
        looked_at(fail, range(100_000), "", "")
    assert len(asked) < 1000
