"""Real worlds on real shards: 150 small PNGs like photographs, with labels, in 4 shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscale.prepare.pack import pack

CONFIG = """\
run: {{name: run, dir: {runs}}}
model: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, image_size: 16,
         patch_size: 4, num_labels: 3, drop_path_rate: 0.1}}
objective:
  mae: {{decoder_hidden_size: 16, decoder_num_hidden_layers: 1, decoder_num_attention_heads: 2,
         decoder_intermediate_size: 32}}
  simmim: {{mask_patch: 1}}
data: {{train: ["{shards}"], lanes: 4, window: 32, max_bad_fraction: 0.0, decode: pillow, threads: 1}}
optimizer: {{lr: 2.0e-3, lr_batch: null, clip: 1.0, warmup: 0.1}}
train: {{global_batch: 16, micro_batch: 4, steps: 20}}
parallel: {{timeout_s: 60}}
checkpoint: {{every_steps: 1000}}
tracking: {{mlflow: false}}
log: {{every_steps: 1, trace: true}}
"""


def make_images(folder: Path) -> Path:
    """An ImageFolder of 150 PNGs of several sizes in 3 classes."""
    random = np.random.default_rng(0)
    for number in range(150):
        label = number % 3
        height, width = random.integers(16, 40, size=2)
        coarse = random.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        coarse[..., label] //= 4
        path = folder / f"class{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path)
    return folder


def make_shards(folder: Path) -> Path:
    """Those images in 4 shards."""
    pack(make_images(folder / "images"), folder / "shards", shard_samples=40, workers=1)
    return folder / "shards"


def write_config(folder: Path, shards: Path, runs: Path) -> Path:
    """folder/config.yaml of a small run in the folder runs/run."""
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(runs=runs, shards=f"{shards}/*.tar"))
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    """A config whose run folder is tmp_path/runs/run."""
    return write_config(tmp_path, shards, tmp_path / "runs")
