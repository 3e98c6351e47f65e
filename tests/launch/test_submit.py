"""What `vitscale submit` looks at and hands over; by a real sbatch: tests/integration/test_slurm.py."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from vitscale.errors import ConfigError, LaunchError
from vitscale.launch.submit import ROOT, SCRIPT, submit

CONFIG = ROOT / "configs" / "pretrain_vit_h_mae.yaml"
DATA = "data.train=/a b/*.tar"


def test_the_command_that_would_be_run() -> None:
    words = shlex.split(submit(CONFIG, [DATA], 4, 8, ["--partition=gpu"], dry_run=True))
    assert words == [
        f"VITSCALE_HOME={ROOT}", f"CONFIG={CONFIG}", "sbatch", "--nodes=4", "--gpus-per-node=8", "--job-name=vit_h_mae",
        "--partition=gpu", str(SCRIPT), DATA,
    ]  # fmt: skip


@pytest.mark.parametrize(("overrides", "nodes", "options", "words"), [
    ([DATA], 3, [], r"train\.global_batch=4096.*24 ranks"),
    ([DATA, "train.lr=1"], 4, [], r"train\.lr"),
    ([], 4, [], r"data\.train: names no shards"),
    ([DATA], 4, ["partition=gpu"], "--option 'partition=gpu': must be one of sbatch's"),
    ([DATA], 4, ["-N2"], "--option '-N2'"),
])  # fmt: skip
def test_what_would_fail_in_the_queue(overrides: list[str], nodes: int, options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        submit(CONFIG, overrides, nodes, 8, options, dry_run=True)


def test_where_there_is_no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sbatch: is not on the PATH"):
        submit(CONFIG, [DATA], 4, 8, [], dry_run=False)
