"""The report of a run: what it says first, that it needs no other file, and that odd runs do not break it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitscale.errors import CheckpointError
from vitscale.evaluation.figures import Features, draw_neighbours, draw_patches
from vitscale.launch import attempts
from vitscale.run.report import report
from vitscale.run_folder import STOP_REASON, RunFolder


class Page(HTMLParser):
    """Text, headings and everything that a page refers to; an element that is not closed is an error."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.references: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def row(step: int, **fields: Any) -> dict[str, Any]:
    return {"step": step, "samples": 16 * step, "loss": 1 / step, "lr": 1e-3, "images_per_second": 100.0} | fields


def made(folder: Path, rows: list[dict[str, Any]], **files: Any) -> Page:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Page(report(RunFolder(folder)))


def scores(probe: float, **more: float) -> dict[str, float]:
    return {"linear_probe": probe, "linear_probe_se": 0.01, "knn": probe, "knn_se": 0.01} | more


def test_the_first_line_says_whether_it_is_better(tmp_path: Path) -> None:
    compared = {"trained": scores(0.8), "untrained": scores(0.5), "pixels": scores(0.79), "start": scores(0.9)}
    page = made(tmp_path, [row(1), row(2)], summary={"evaluation": {"scores": compared}})
    first = page.text[: page.text.index("Curves")]
    said = re.findall(r"(\w+):\s+(yes|no|no clear difference)\s+\((.*?)\)", first)
    assert said == [
        ("untrained", "yes", "80.0 % against 50.0 %"),
        ("pixels", "no clear difference", "80.0 % against 79.0 %"),
        ("start", "no", "80.0 % against 90.0 %"),
    ]


def test_scores_of_training_serve_where_there_are_no_others(tmp_path: Path) -> None:
    rows = [row(1), row(2, **{f"evaluation/{name}": value for name, value in scores(0.7).items()})]
    page = made(tmp_path, rows, baselines={"untrained": scores(0.3), "cut to": {"images": 100}})
    assert "70.0 % against 30.0 %" in page.text
    assert "Frozen features" in page.text
    assert "cut to" not in page.text
    rows[1]["evaluation/linear_probe"] = "NaN"
    assert "untrained" in made(tmp_path, rows, baselines={"of": "0123", "untrained": scores(0.3)}).text


def test_a_classifier_shows_its_classes(tmp_path: Path) -> None:
    classes = [{"class": name, "images": 4, "recall": recall, "precision": 1.0, "f1": 0.5}
               for name, recall in (("cat", 1.0), ("<b>dog</b>", 0.25))]  # fmt: skip
    validation = {"step": 2, "scores": {"validation/top1": 0.625}, "classes": classes, "confusion": [[4, 0], [3, 1]]}
    summary = {"best": {"metric": "validation/top1", "value": 0.625, "step": 2}}
    page = made(tmp_path, [row(1), row(2)], validation=validation, summary=summary)
    first = " ".join(page.text.split())
    assert "Best validation/top1: 0.6250 , at step 2. Better than the start, untrained, pixels? Not measured" in first
    assert f"vitscale evaluate {tmp_path} tells" in first
    assert page.text.index("<b>dog</b>") < page.text.index("cat"), "the worst first, and no markup"
    assert "Confusion matrix" in page.text
    evaluation = {"scores": {"trained": scores(0.8), "pixels": scores(0.5)}, "test_scores": {"test/top1": 0.65}}
    told = " ".join(made(tmp_path, [row(1), row(2)], summary=summary | {"evaluation": evaluation}).text.split())
    assert (
        "(80.0 % against 50.0 %). By a linear probe of frozen features. By what it was trained for: test/top1" in told
    )
    del evaluation["test_scores"]  # its classes are others than those of the images
    told = " ".join(made(tmp_path, [row(1), row(2)], summary=summary | {"evaluation": evaluation}).text.split())
    assert "By a linear probe of frozen features. Best validation/top1: 0.6250" in told


def test_only_what_a_probe_is_for_is_asked_for(tmp_path: Path) -> None:
    numbers = {"step": 2, "scores": {"validation/loss": 0.5, "validation/mae": 0.25, "validation/images": 9.0}}
    text = " ".join(made(tmp_path, [row(2)], validation=numbers).text.split())
    assert "Held-out images at step 2: validation/mae 0.2500. step" in text
    hidden = {"step": 2, "scores": {"validation/loss": 0.5, "validation/images": 9.0}}
    text = " ".join(made(tmp_path, [row(2)], validation=hidden).text.split())
    assert "Held-out images at step" not in text[: text.index("Curves")]
    assert "Not measured" in text


def test_it_needs_no_other_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = Features(random.random((20, 8, 8, 3)), np.arange(20) % 2, random.normal(size=(20, 6)),
                        random.normal(size=(5, 4, 4, 6)))  # fmt: skip
    draw_neighbours(features, tmp_path / "figures" / "neighbours.png", "title")
    draw_patches(features, tmp_path / "figures" / "patches.png", "title")
    page = made(tmp_path, [row(1), row(2)])
    outside = [each for each in page.references if not each.startswith(("data:", "#"))]
    assert outside == []
    assert sum(each.startswith("data:image/png") for each in page.references) == 2
    assert "Not measured: vitscale evaluate" in " ".join(page.text.split())


def test_starts_and_bad_samples_are_counted(tmp_path: Path) -> None:
    rows = [row(step, tracking_share=0.0, data_share=0.25, skipped_steps=1, bad_samples=3) for step in range(1, 9)]
    for attempt, (code, reason) in {"1": (3, "a rank is gone"), "2": (None, ""), "3": (3, STOP_REASON)}.items():
        folder = RunFolder(tmp_path, attempt)
        attempts.begin(folder, ranks=2, most_restarts=3)
        if code is not None:  # else it was ended together with its launcher
            attempts.end(folder, code, reason)
    attempts.begin(RunFolder(tmp_path, "4"), ranks=2, most_restarts=3)
    (tmp_path / "quarantine.jsonl").write_text('{"cause": "decode"}\n{"cause": "decode"}\n{"cause": "label"}\n')
    text = made(tmp_path, rows).text
    assert "4 (faults of the infrastructure: 2; stopped on request: 1)" in text
    assert "3: 2 decode, 1 label" in text
    assert "25.00 % of the time" in text


def test_faults_that_a_run_survived_are_told(tmp_path: Path) -> None:
    rows = [row(1), row(30, data_retries=7, save_failures=1)]
    text = made(tmp_path, rows).text
    for told in ("rollbacks before a spike 0 ", "reads of data tried again 7 ", "checkpoints not saved 1 "):
        assert told in text
    entry = {"step": 25, "reason": "the loss", "back_to_step": 20, "skipped_batches": [23, 24], "time": 0}
    (tmp_path / "rollbacks.json").write_text(json.dumps([entry]))
    text = made(tmp_path, rows, summary={"save_failures": 2}).text
    assert "rollbacks before a spike 1: from step 25 to 20, without 2 batches " in text
    assert "checkpoints not saved 2 " in text, "the last save comes after the last row"


def test_long_and_odd_runs(tmp_path: Path) -> None:
    """Many rows are averaged; what is not finite leaves a gap; a name is not markup."""
    rows = [row(step, grad_norm="NaN" if step % 7 == 0 else 1.0) for step in range(1, 20_001)]
    page = made(tmp_path / "<i>run", rows)
    assert (tmp_path / "<i>run" / "report.html").stat().st_size < 400_000
    assert page.text.startswith("<i>run ")
    assert "320,000 images seen" in page.text
    one = made(tmp_path / "one", [row(1, loss="Infinity")])
    assert "Learning rate" in one.text


def test_a_folder_with_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither metrics\.jsonl nor evaluation\.jsonl"):
        report(RunFolder(tmp_path))
