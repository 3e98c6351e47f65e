"""A run whose reader gets EIO, ESTALE, short and slow reads from the C library: the run is as without them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.worlds import Launcher, losses, rows, trace
from vitscale.run_folder import STOPPED

STEPS = 12
Ended = tuple[list[int], str]  # exit codes by rank, what they printed
SOURCE = Path(__file__).with_name("faulty_reads.c")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here (cc), to make the library that lets reads fail")
    path = tmp_path_factory.mktemp("library") / "faulty_reads.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", path, SOURCE, "-ldl"], check=True)
    return path


@pytest.fixture
def run(launcher: Launcher, config: Path, shards: Path, tmp_path: Path, library: Path) -> Callable[..., Ended]:
    """Runs whose readers have faulty storage, on shards without tables."""
    for path in shards.glob("*.tar"):
        shutil.copy(path, tmp_path)

    def run(*overrides: str, **environment: str) -> Ended:
        argv = ["pretrain", str(config), f"data.train={tmp_path}/*.tar", f"train.steps={STEPS}", *overrides]
        world = launcher.request(2, argv=argv, environment={"LD_PRELOAD": str(library), **environment})
        return world.wait(), world.output()

    return run


def test_the_run_is_as_without_faults(
    launcher: Launcher, config: Path, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    """Two ranks, each of whose readers has its storage fail for a second in the middle."""
    launcher.run(["pretrain", str(config), f"train.steps={STEPS}", "run.name=local"], ranks=2)
    codes, output = run(FAULTY_AFTER="60", FAULTY_MS="1000")
    assert codes == [0, 0], output
    local, faulty = tmp_path / "runs" / "local", tmp_path / "runs" / "run"
    assert trace(faulty) == trace(local)
    assert losses(faulty) == losses(local)
    assert rows(faulty)[-1]["data_retries"] >= 4, "two or more on each rank"
    assert rows(faulty)[-1]["bad_samples"] == 0
    assert "storage: " in output


@pytest.mark.full
def test_storage_that_stays_away_requeues(run: Callable[..., Ended]) -> None:
    codes, output = run("data.patience_s=1", FAULTY_AFTER="60", FAULTY_MS="-1")
    assert codes == [STOPPED] * 2, output
    assert "its storage failed" in output
    assert "Traceback" not in output
