"""A clock on the wall that jumps a day ahead and a day back, on all processes of a run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_launcher import STEPS, Launched, launched  # noqa: F401 - a fixture
from tests.integration.worlds import Launcher, losses, rows, trace
from vitscale.run_folder import DONE, STOPPED

pytestmark = pytest.mark.full

DAY_MS = 86_400_000
SOURCE = Path(__file__).with_name("jumping_clock.c")


def test_nothing_is_measured_or_ordered_by_it(
    launcher: Launcher,
    config: Path,
    tmp_path: Path,
    launched: list[Launched],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launcher, torchrun, two ranks and their readers; stopped in the middle, and gone on with from the newest step."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler here (cc), to make the library that lets the clock jump")
    library = tmp_path / "jumping_clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE, "-ldl"], check=True)
    keys = ["parallel.zero_stage=2", "checkpoint.every_steps=10"]
    launcher.run(["pretrain", str(config), f"train.steps={STEPS}", "run.name=unbroken", *keys], 2)

    monkeypatch.setenv("LD_PRELOAD", str(library))
    first = Launched(config, *keys)
    launched.append(first)
    first.wait_for_steps(15)
    first.process.terminate()
    assert first.wait() == STOPPED, first.log.read_text()
    second = Launched(config, *keys)
    launched.append(second)
    assert second.wait() == DONE, second.log.read_text()
    monkeypatch.delenv("LD_PRELOAD")

    unbroken = tmp_path / "runs" / "unbroken"
    assert losses(second.run) == losses(unbroken)
    assert trace(second.run) == trace(unbroken)
    times = [row["time"] for row in rows(second.run)]
    assert max(times) - min(times) > DAY_MS, "it jumped"
    assert all(0 < row["images_per_second"] < 1e6 and 0 < row["step_seconds"] < 60 for row in rows(second.run))
    assert "has given no sign of life" not in second.log.read_text()
