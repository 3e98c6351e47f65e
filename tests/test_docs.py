"""Every code block of docs/models.md runs as it stands, in order, from an empty folder.

Of finetune.md and evaluate.md those run that stand on the quick start.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.warm_cli import warm_commands

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "docs" / "models.md"
COMPARISON = ".max())"  # how a block prints that two libraries give the same
DIFFERENCE = re.compile(r"^(?:tensor\()?(\d+\.\d*(?:e-\d+)?|\d+e-\d+)(?:, .*)?\)?$", re.MULTILINE)
FENCE = re.compile(r"^```(?P<language>\w+)(?P<words>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line it starts at, and whether it is only to be read."""

    language: str
    code: str
    line: int
    runs: bool


def blocks(text: str) -> list[Block]:
    return [
        Block(
            language=found["language"],
            code=found["code"],
            line=text.count("\n", 0, found.start("code")) + 1,
            runs="no-run" not in found["words"].split(),
        )
        for found in FENCE.finditer(text)
    ]


def run_python(block: Block) -> str:
    """As a script of its own; what it printed."""
    out = io.StringIO()
    name = f"models.md, line {block.line}"
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), {"__name__": "__main__"})
    return out.getvalue()


def run_bash(block: Block, folder: Path, environment: dict[str, str]) -> str:
    """By bash, which stops at the first command that fails; what it printed."""
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"line {block.line}: {block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def differences(block: Block, text: str) -> list[float]:
    """What the comparisons of a block printed."""
    if COMPARISON not in block.code:
        return []
    found = [float(number) for number in DIFFERENCE.findall(text)]
    assert len(found) == block.code.count(COMPARISON), f"models.md, line {block.line}: {text}"
    return found


def test_the_blocks_of_models_md_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, folder = tmp_path / "work", tmp_path / "bin"
    for each in (work, folder):
        each.mkdir()
    monkeypatch.chdir(work)
    printed, differ = [], []
    with warm_commands(folder) as ready:
        for block in blocks(MODELS.read_text(encoding="utf-8")):
            if block.runs:
                python = block.language == "python"
                printed.append(run_python(block) if python else run_bash(block, work, ready()))
                differ += differences(block, printed[-1])
    said = "\n".join(printed)
    for text in ("seven (1, 17, 64)", "num_labels", "['classifier.bias', 'classifier.weight']", "layers.0-2"):
        assert text in said, text
    assert len(differ) >= 3, "transformers, timm, and the exported files against each other"
    assert max(differ) < 1e-4
    # What it makes is there, and the reader reads.
    rows = list(csv.DictReader(Path("predictions.csv").read_text(encoding="utf-8").splitlines()))
    first = [row for row in rows if row["rank"] == "1"]
    right = [Path(row["image"]).parent.name == row["label"] for row in first]
    assert len(first) == 297
    assert sum(right) > 0.7 * len(right)
    assert sum(len(np.load(path)) for path in Path("features").glob("*.npy")) == 297
    for picture in ("looks/gradients.png", "looks/1501-attention.png"):
        with Image.open(picture) as opened:
            assert opened.format == "PNG"
    for name in ("reader.onnx", "reader-int8.onnx", "reader.pt2", "reader-timm/model.safetensors"):
        assert Path(name).stat().st_size > 500
    smaller = json.loads(Path("reader-pruned/config.json").read_text(encoding="utf-8"))
    assert smaller["intermediate_size"] == 96


@pytest.mark.full
def test_the_blocks_that_stand_on_the_quick_start_run(tmp_path: Path) -> None:
    """From a folder with what a checkout has, after a shorter quick start."""
    for name, there in (("configs", ROOT / "configs"), ("launch", ROOT / "launch"), (".venv", Path(sys.prefix))):
        (tmp_path / name).symlink_to(there)
    hidden = ("SLURM_", "RANK", "NNODES", "NPROC_", "RDZV_", "LOCAL_", "WORLD_", "MASTER_", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    environment |= {"VITSCALE_VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
    quick_start = "python -m vitscale.prepare.digits runs/quickstart-data\n"
    quick_start += "NPROC_PER_NODE=2 launch/torchrun.sh pretrain configs/quickstart.yaml train.steps=40\n"
    run_bash(Block("bash", quick_start, 0, True), tmp_path, environment)

    run = [
        block
        for name in ("finetune.md", "evaluate.md")
        for block in blocks((ROOT / "docs" / name).read_text(encoding="utf-8"))
        if "quickstart" in block.code
    ]
    assert len(run) == 4
    for block in run:
        run_bash(block, tmp_path, environment)
    runs = tmp_path / "runs"
    for name in ("finetune_quickstart", "on_two_ranks"):
        best = json.loads((runs / name / "summary.json").read_text(encoding="utf-8"))["best"]
        assert best["value"] == best["scores"]["validation/top1"] > 0.5
        assert len(json.loads((runs / name / "validation.json").read_text(encoding="utf-8"))["classes"]) == 10
    watched = (runs / "watched" / "metrics.jsonl").read_text(encoding="utf-8")
    assert (watched.count('"evaluation/linear_probe":'), watched.count('"validation/loss":')) == (4, 4)
    for name in ("quickstart", "scores"):
        scores = json.loads((runs / name / "summary.json").read_text(encoding="utf-8"))["evaluation"]
        assert (scores["test"], scores["scores"].keys() >= {"trained", "untrained", "pixels"}) == (360, True)
        assert (runs / name / "report.html").stat().st_size > 10_000


def test_blocks_that_are_not_run_are_few_and_can_be_read() -> None:
    rest = [block for block in blocks(MODELS.read_text(encoding="utf-8")) if not block.runs]
    assert 0 < len(rest) < 6
    for block in rest:
        if block.language == "python":
            compile(block.code, f"models.md, line {block.line}", "exec")
        else:
            subprocess.run(["bash", "-n", "-c", block.code], check=True)


def test_every_block_is_found() -> None:
    text = MODELS.read_text(encoding="utf-8")
    found = blocks(text)
    assert len(found) == len(re.findall("^```$", text, re.MULTILINE))
    assert {block.language for block in found} == {"python", "bash"}
    assert text.splitlines()[found[0].line - 2] == "```python"
