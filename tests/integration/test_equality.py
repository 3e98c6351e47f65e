"""The same curve whatever the ranks, the ZeRO stage and the accumulation (fp32)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.integration.worlds import Launcher, losses, trace

RANKS, STAGES, ACCUMULATIONS = (1, 2, 4), (0, 1, 2, 3), (1, 2)
DIAGONAL = {(2, 0, 2), (2, 1, 2), (1, 2, 2), (4, 2, 1), (2, 3, 2), (4, 3, 1), (4, 0, 1)}


@pytest.fixture(scope="module")
def reference(launcher: Launcher, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, stage 0, no accumulation."""
    from tests.integration.conftest import write_config

    folder = tmp_path_factory.mktemp("reference")
    config = write_config(folder, shards, folder)
    launcher.run(["pretrain", str(config), "train.micro_batch=16"])
    return folder / "run"


@pytest.mark.parametrize(
    ("ranks", "stage", "accumulation"),
    [
        pytest.param(*setting, marks=[] if setting in DIAGONAL else pytest.mark.full)
        for setting in itertools.product(RANKS, STAGES, ACCUMULATIONS)
    ],
)
def test_curve_is_the_same(
    launcher: Launcher, config: Path, tmp_path: Path, reference: Path, ranks: int, stage: int, accumulation: int
) -> None:
    micro = 16 // ranks // accumulation
    argv = ["pretrain", str(config), f"train.micro_batch={micro}", f"parallel.zero_stage={stage}"]
    launcher.run(argv, ranks=ranks)
    run = tmp_path / "runs" / "run"
    assert trace(run) == trace(reference)
    expected = losses(reference)
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 20
    assert expected[20] < 0.95 * expected[1]
