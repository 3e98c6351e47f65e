"""launch/torchrun.sh with two real ranks: on a machine without a compiler, and the verbs beside pretrain."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.makers import photo, write_tar
from tests.integration.conftest import make_images
from tests.integration.worlds import ROOT, losses, rows

TUNING = """\
run: {{name: tuned, dir: {runs}}}
model: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, image_size: 16,
         patch_size: 8}}
data: {{train: [{images}], validation_fraction: 0.2, lanes: 2, window: 32, decode: pillow, threads: 1}}
augment: {{preset: randaug, mixup: 0.2, cutmix: 0.0, rand_augment: null}}
train: {{global_batch: 16, micro_batch: 4, steps: 2, keep_best: validation/top1}}
tracking: {{mlflow: false}}
"""


def torchrun(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/torchrun.sh WORDS on two ranks."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK"))}
    own = {"VITSCALE_VENV": sys.prefix, "NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    bash = shutil.which("bash", path=environment.get("PATH"))
    command = [str(bash), str(ROOT / "launch" / "torchrun.sh"), *words]
    return subprocess.run(command, env={**inherited, **own, **environment}, capture_output=True, text=True, timeout=300)


def test_torchrun_without_a_compiler(config: Path, tmp_path: Path) -> None:
    """ZeRO-2 where no c++, cc or ninja is on PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "env", "dirname", "git", "uname"):
        (tools / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    assert shutil.which("c++", path=str(tools)) is None
    environment = {"PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CC": "", "CXX": ""}
    done = torchrun("pretrain", str(config), "parallel.zero_stage=2", "train.steps=3", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "runs" / "run")) == 3
    assert not list(tmp_path.glob("extensions/**/*.so"))


def test_a_folder_of_images_is_learned_then_scored(tmp_path: Path) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "tuned"
    config.write_text(TUNING.format(runs=tmp_path, images=make_images(tmp_path / "images")))
    done = torchrun("finetune", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    last = rows(run)[-1]
    assert (last["step"], "validation/top1" in last) == (2, True)

    done = torchrun("evaluate", str(run), RESTARTS="3")
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((run / "summary.json").read_text())["evaluation"]
    assert scores["test_scores"]["test/images"] == last["validation/images"]


@pytest.mark.full
def test_an_evaluation_that_is_refused(config: Path, tmp_path: Path) -> None:
    """By rank 0 alone, while the other one waits to meet it; it is not started again."""
    assert torchrun("pretrain", str(config), "train.steps=1").returncode == 0
    refused = torchrun("evaluate", str(tmp_path / "runs" / "run"), "evaluation.test=/nowhere/*.tar", RESTARTS="3")
    assert refused.returncode == 2, "torchrun itself says 1"
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("vitscale: error: ")]
    assert "/nowhere/*.tar" in line


@pytest.mark.full
def test_labels_that_are_none_of_the_classes(tmp_path: Path) -> None:
    config, shard = tmp_path / "config.yaml", tmp_path / "a.tar"
    pairs = [(f"{number:03d}", number) for number in range(40)]
    images = [(f"{name}.jpg", photo(number)) for name, number in pairs]
    write_tar(shard, sorted(images + [(f"{name}.cls", str(number % 3).encode()) for name, number in pairs]))
    config.write_text(TUNING.format(runs=tmp_path, images=shard))
    done = torchrun("finetune", str(config), "model.num_labels=2")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "2, with model.num_labels=2" in done.stderr.splitlines()[-1]
    assert json.loads((tmp_path / "tuned" / "exit.json").read_text())["code"] == 2
